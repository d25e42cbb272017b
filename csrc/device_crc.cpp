#include "device_crc.h"

#include <algorithm>
#include <atomic>

#include "arena.h"
#include "crc32.h"

namespace asyncckpt {
namespace {

constexpr size_t kBounceNbytes = size_t{4} << 20;

}  // namespace

DeviceFailure device_crc32(Device& device, uint64_t caller_stream, uint64_t address,
                           uint64_t nbytes, uint32_t* crc) {
  // One buffer pair for the process: pinning takes longer than most copies.
  static std::mutex mutex;
  static Arena* const bounce = new Arena(2, kBounceNbytes);  // never unpinned: see Device
  static bool pinned = false;
  std::lock_guard<std::mutex> lock(mutex);
  if (!pinned) {
    bounce->pin(device, std::atomic<bool>{false}, [](size_t) {});  // refused, it is slower
    pinned = true;
  }
  cuda::Event events[2] = {nullptr, nullptr};
  DeviceFailure failure = device.record(caller_stream, &events[0]);
  if (!failure) failure = device.order_after(Device::Way::to_host, events[0]);
  device.give_back(events[0]);
  events[0] = nullptr;

  // While one buffer is checksummed, the other is filled.
  *crc = 0;
  uint64_t begun = 0;
  uint64_t done = 0;
  const auto size_at = [&](uint64_t offset) {
    return static_cast<size_t>(std::min<uint64_t>(kBounceNbytes, nbytes - offset));
  };
  while (!failure && done < nbytes) {
    while (!failure && begun < nbytes && begun < done + 2 * kBounceNbytes) {
      const size_t side = begun / kBounceNbytes % 2;
      failure = device.copy(Device::Way::to_host,
                            {{bounce->chunk(side), address + begun, size_at(begun)}});
      if (!failure) failure = device.record(Device::Way::to_host, &events[side]);
      begun += size_at(begun);
    }
    const size_t side = done / kBounceNbytes % 2;
    if (!failure) failure = device.wait(events[side]);
    if (failure) break;
    device.give_back(events[side]);
    events[side] = nullptr;
    *crc = crc32(*crc, bounce->chunk(side), size_at(done));
    done += size_at(done);
  }
  for (cuda::Event event : events) {
    if (event == nullptr) continue;
    device.wait(event);  // nothing may be under way into the buffers when the next call comes
    device.give_back(event);
  }
  return failure;
}

}  // namespace asyncckpt
