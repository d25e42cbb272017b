// Memory that the engine does not own: of this process, or of a CUDA device.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_driver.h"

namespace asyncckpt {

constexpr int kHost = -1;  // in place of a device's ordinal

// What the driver refused; empty when all went well.
struct DeviceFailure {
  std::string operation;  // "cuMemcpyDtoHAsync", ...
  std::string reason;     // the driver's own name and text for it

  explicit operator bool() const { return !operation.empty(); }
};

// A device cannot be used.
struct DeviceError : std::runtime_error {
  explicit DeviceError(const DeviceFailure& failure)
      : std::runtime_error(failure.operation + ": " + failure.reason) {}
};

struct DeviceCopy {  // between host memory and the device's
  char* host;
  uint64_t address;
  size_t nbytes;
};

// A stream of whoever calls us: of the current context's device, 0 being its default stream.
struct CallerStream {
  int device;
  uint64_t handle;
};

// One CUDA device as a source and target of copies: two streams of our own, and events.
//
// Guarantees
//   - No call waits for a context or a stream as a whole; wait() sleeps until one event.
//   - Work that the caller had enqueued on its stream when order_after() was called is done before
//     any copy that comes after it.
//   - Calls may come from any thread, also while another thread captures a CUDA graph. They leave
//     the thread's current context as it was.
//   - Streams and the primary context are never given up: other threads of the host program may be
//     in the driver until the process ends.
class Device {
 public:
  enum class Way { to_host, to_device };

  // The process's one object for a device. nullptr, and why in `failure`, if it cannot be had.
  static Device* get(const std::string& library, int ordinal, DeviceFailure* failure);

  int ordinal() const { return ordinal_; }

  // Why copies go one by one although the driver knows batches: it refused one, and not the copies in it.
  DeviceFailure batch_failure();

  // Enqueues copies. Host memory that is not registered is copied before this returns.
  // After a failure some of the copies may be under way: record() and wait() all the same. Where these
  // are refused too, nobody can tell when the memory is free again: it must be given up for good.
  DeviceFailure copy(Way way, const std::vector<DeviceCopy>& copies);

  // An event from the pool, or a new one. To be had before copies are enqueued: what says that they have
  // ended must not be missing once they are under way. nullptr after a failure.
  DeviceFailure acquire(cuda::Event* event);
  // Records the event behind what was enqueued so far: our copies, or a caller's work.
  DeviceFailure record(Way way, cuda::Event event);
  DeviceFailure record(uint64_t caller_stream, cuda::Event event);

  DeviceFailure order_after(Way way, cuda::Event event);  // our later copies wait for it
  DeviceFailure make_wait(uint64_t caller_stream,
                          cuda::Event event);  // the caller's later work does
  DeviceFailure wait(cuda::Event event);       // this thread does

  // Back to the pool. What waits for the event goes on waiting for what was recorded last.
  void give_back(cuda::Event event);

  // Pins memory for all devices, so that copies run beside the host. The memory must stay mapped
  // until it is unregistered.
  DeviceFailure register_memory(void* memory, size_t nbytes);
  void unregister_memory(void* memory);

 private:
  class Current;

  Device(const cuda::Driver& driver, int ordinal) : driver_(driver), ordinal_(ordinal) {}
  DeviceFailure open();
  DeviceFailure failed(const char* operation, cuda::Result result) const;
  DeviceFailure record_on(cuda::Stream stream, cuda::Event event);
  bool has_batches() const;
  cuda::Result copy_as_batch(Way way, const std::vector<DeviceCopy>& copies);
  cuda::Stream stream(Way way) const { return way == Way::to_host ? to_host_ : to_device_; }

  const cuda::Driver& driver_;
  const int ordinal_;
  cuda::Context context_ = nullptr;
  cuda::Stream to_host_ = nullptr;
  cuda::Stream to_device_ = nullptr;
  std::atomic<bool> batches_{true};  // until the driver refuses one
  std::mutex mutex_;
  DeviceFailure batch_failure_;
  std::vector<cuda::Event> free_events_;
};

}  // namespace asyncckpt
