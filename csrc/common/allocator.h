#pragma once

#include <string>

namespace hybridengine {

// Tells glibc's malloc to keep freed pages instead of returning them to the system, so that tensors of the next
// step reuse touched memory. Changes the whole process and cannot be undone; returns "" or why nothing was changed.
std::string tune_allocator();

}  // namespace hybridengine
