#include "embedding/embedding.h"

#include <cstring>

#include "common/parallel.h"

namespace hybridengine {
namespace {

// Each range of rows belongs to one thread, which looks at every id: so rows are summed in order, without locks.
template <class Element>
void fill_rows(const EmbeddingGradient& work, int64_t begin, int64_t end) {
  Element* const output = static_cast<Element*>(work.output);
  const Element* const gradient = static_cast<const Element*>(work.gradient);
  const int64_t width = work.width;
  // memset writes large blocks past the cache, where a loop of stores would first read what it overwrites.
  std::memset(output + begin * width, 0, (end - begin) * width * sizeof(Element));
  for (int64_t i = 0; i < work.count; ++i) {
    const int64_t row = work.ids[i];
    if (row < begin || row >= end || row == work.padding) continue;
    Element* const target = output + row * width;
    const Element* const source = gradient + i * width;
    for (int64_t column = 0; column < width; ++column) target[column] += source[column];
  }
}

}  // namespace

void embedding_gradient(const EmbeddingGradient& work) {
  const int64_t grain = 65536 / (work.width + 1) + 1;
  parallel_for(work.rows, grain, [&](int64_t begin, int64_t end) {
    if (work.element == ElementType::float64) {
      fill_rows<double>(work, begin, end);
    } else {
      fill_rows<float>(work, begin, end);
    }
  });
}

}  // namespace hybridengine
