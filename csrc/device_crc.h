// CRC-32 of memory that the host cannot read.
#pragma once

#include <cstdint>

#include "device.h"

namespace asyncckpt {

// Of `nbytes` at `address`, as they are once the caller's stream has done what it has now. Copies
// them through a small pinned buffer, and waits for that.
DeviceFailure device_crc32(Device& device, uint64_t caller_stream, uint64_t address,
                           uint64_t nbytes, uint32_t* crc);

}  // namespace asyncckpt
