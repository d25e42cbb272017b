// CRC-32 as zip and zlib define it (reflected polynomial 0xEDB88320).
#pragma once

#include <cstddef>
#include <cstdint>

namespace asyncckpt {

// The CRC of `data` appended to bytes whose CRC is `crc` (0 for none).
uint32_t crc32(uint32_t crc, const void* data, size_t nbytes);

// The same of what is at `to` afterwards: `data` is copied there meanwhile, past the cache (see
// streaming_copy.h). That holds even if `data` changes at the same time. Best where it is in the cache.
uint32_t crc32_copy(uint32_t crc, void* to, const void* data, size_t nbytes);

// Whether that costs little more than the copy. Not with the portable kernel.
bool crc32_goes_along();

// The CRC of A followed by B, from the CRC of A, the CRC of B and the size of B.
uint32_t crc32_combine(uint32_t crc_a, uint32_t crc_b, uint64_t nbytes_b);

// "clmul-512", "clmul-256", "clmul-128" or "table": which kernel this machine runs.
const char* crc32_kernel();

// The portable kernel, whatever the machine; so that a test can hold one against the other.
uint32_t crc32_portable(uint32_t crc, const void* data, size_t nbytes);

}  // namespace asyncckpt
