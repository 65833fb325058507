// Included once per instruction set by cpu.cpp.

static void copy_chunks(const CopiedBytes* parts, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) stream_copy(parts[i].target, parts[i].source, parts[i].bytes);
  finish_streaming();
}
