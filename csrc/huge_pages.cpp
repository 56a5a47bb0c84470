// Ask the kernel to back a fresh buffer with huge pages. First touch of a large buffer in 4 KiB pages
// costs as much as the GEMM that fills it; in 2 MiB pages it costs the zeroing alone. Advice only.
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

FASTPOST_EXPORT void fastpost_advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}
FASTPOST_ARGUMENTS(fastpost_advise_huge_pages)
