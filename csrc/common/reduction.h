#pragma once

namespace hybridengine {

// What becomes of the losses of the rows. The numbers are shared with the `autograd.py` of the losses in
// hybridengine/kernels.
enum class Reduction : int { none = 0, sum = 1, mean = 2 };

}  // namespace hybridengine
