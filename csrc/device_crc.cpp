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
  // One buffer pair for the process: pinning takes longer than most copies. Never unpinned: see Device.
  static std::mutex mutex;
  static Arena* bounce = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  if (bounce == nullptr) {
    bounce = new Arena(2, kBounceNbytes);
    bounce->pin(device, std::atomic<bool>{false}, [](size_t) {});  // refused, it is slower
  }
  cuda::Event events[2] = {nullptr, nullptr};
  bool copying[2] = {false, false};  // until the event of this side
  bool in_doubt = false;             // copies may be under way whose end nothing tells
  DeviceFailure failure = device.acquire(&events[0]);
  if (!failure) failure = device.acquire(&events[1]);
  if (!failure) failure = device.record(caller_stream, events[0]);
  if (!failure) failure = device.order_after(Device::Way::to_host, events[0]);

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
      const DeviceFailure unrecorded = device.record(Device::Way::to_host, events[side]);
      copying[side] = !unrecorded;
      in_doubt = in_doubt || unrecorded;
      if (!failure) failure = unrecorded;
      begun += size_at(begun);
    }
    if (failure) break;
    const size_t side = done / kBounceNbytes % 2;
    copying[side] = false;
    failure = device.wait(events[side]);
    in_doubt = in_doubt || failure;
    if (failure) break;
    *crc = crc32(*crc, bounce->chunk(side), size_at(done));
    done += size_at(done);
  }
  // Nothing may be under way into the buffers when the next call comes; else it takes others.
  for (size_t side = 0; side < 2; ++side) {
    if (copying[side] && device.wait(events[side])) in_doubt = true;
    device.give_back(events[side]);
  }
  if (in_doubt) bounce = nullptr;
  return failure;
}

}  // namespace asyncckpt
