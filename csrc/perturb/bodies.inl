// What cpu.cpp compiles once per instruction set.

#include "perturb/walk.inl"
#include "perturb/wide.inl"
#include "perturb/step.inl"
#include "perturb/start.inl"
