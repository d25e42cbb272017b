#include "reader.h"

#include <errno.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <stdexcept>
#include <utility>

#include "arena.h"
#include "crc32.h"
#include "streaming_copy.h"
#include "threads.h"

namespace asyncckpt {

// One thread's: while a device still copies out of one, the other is filled. Where all goes to the host, there
// is one: each is memory to be found and cleared.
class Reading::Buffers {
 public:
  Buffers(size_t nbytes, const std::vector<Device*>& devices)
      : arena_(devices.empty() ? 1 : 2, nbytes), devices_(devices) {
    // Not pinned, it is slower and no less right.
    if (!devices.empty()) arena_.pin(*devices[0], std::atomic<bool>{false}, [](size_t) {});
  }
  ~Buffers() {
    for (auto& side : leaving_) await(side);
    if (in_doubt_) arena_.abandon();
  }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  // Turns to the other buffer, and waits until it is free; after a failure it may never be.
  DeviceFailure turn() {
    side_ = (side_ + 1) % arena_.chunks();
    return await(leaving_[side_]);
  }

  char* data() const { return arena_.chunk(side_); }

  void add(const Segment& segment, uint64_t from, uint64_t to, uint64_t begin) {
    copies_.push_back({data() + (from - begin), segment.address + (from - segment.offset),
                       static_cast<size_t>(to - from)});
    of_.push_back(segment.device);
  }

  // Sends what was added on its way.
  DeviceFailure send() {
    DeviceFailure failure;
    for (Device* device : devices_) {
      mine_.clear();
      for (size_t i = 0; i < copies_.size(); ++i)
        if (of_[i] == device->ordinal()) mine_.push_back(copies_[i]);
      if (mine_.empty() || failure) continue;
      leaving_[side_].reserve(devices_.size());
      cuda::Event event = nullptr;
      failure = device->acquire(&event);
      if (failure) continue;
      const bool was_in_doubt = std::exchange(in_doubt_, true);
      failure = device->copy(Device::Way::to_device, mine_);
      const DeviceFailure unrecorded = device->record(Device::Way::to_device, event);
      if (unrecorded) {
        device->give_back(event);
      } else {
        leaving_[side_].push_back({device, event});
        in_doubt_ = was_in_doubt;
      }
      if (!failure) failure = unrecorded;
    }
    copies_.clear();
    of_.clear();
    return failure;
  }

 private:
  using Leaving = std::vector<std::pair<Device*, cuda::Event>>;

  DeviceFailure await(Leaving& leaving) {
    DeviceFailure failure;
    for (auto& [device, event] : leaving) {
      if (DeviceFailure one = device->wait(event)) {
        in_doubt_ = true;
        failure = std::move(one);
      }
      device->give_back(event);
    }
    leaving.clear();
    return failure;
  }

  Arena arena_;
  const std::vector<Device*>& devices_;
  size_t side_ = 0;
  std::vector<DeviceCopy> copies_, mine_;
  std::vector<int> of_;
  Leaving leaving_[2];
  bool in_doubt_ = false;  // a device may read the buffers for longer than anything tells
};

namespace {

void check_segments(const FileRead& file) {
  uint64_t end = 0;
  for (const Segment& segment : file.segments) {
    if (segment.offset < end || segment.nbytes > file.nbytes ||
        segment.offset > file.nbytes - segment.nbytes)
      throw std::invalid_argument(file.path + ": segments overlap or leave the file");
    end = segment.offset + segment.nbytes;
  }
}

}  // namespace

Reading::Reading(std::vector<FileRead> files, unsigned threads, bool direct, bool placed,
                 const std::string& driver, const std::vector<CallerStream>& streams)
    : files_(std::move(files)), direct_(direct), placed_(placed) {
  uint64_t total = 0;
  for (const FileRead& file : files_) {
    if (file.block_nbytes == 0 || file.block_nbytes % kDirectAlignment != 0)
      throw std::invalid_argument(file.path + ": block size is not a multiple of 4096");
    const uint64_t blocks = (file.nbytes + file.block_nbytes - 1) / file.block_nbytes;
    if (file.checker >= file.checkers)
      throw std::invalid_argument(file.path + ": there is no such checker");
    if (!file.block_crcs.empty() && file.block_crcs.size() != blocks)
      throw std::invalid_argument(file.path + ": needs one CRC for each of its blocks");
    check_segments(file);
    first_block_.push_back(total);
    // A file of no bytes has no block, but it must be looked at: it may have grown.
    total += std::max<uint64_t>(1, blocks);
    buffer_nbytes_ = std::max<size_t>(buffer_nbytes_, file.block_nbytes);
    opened_.push_back(std::make_unique<Opened>());
    opened_.back()->blocks_left = std::max<uint64_t>(1, blocks);
  }
  first_block_.push_back(total);
  use_devices(driver, streams);
  running_ = static_cast<size_t>(std::min<uint64_t>(std::max(1u, threads), total));
  const size_t wanted = running_;
  try {
    // None works before all are there: finding memory for buffers holds up whoever maps some, and a thread
    // begins with a stack.
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < wanted; ++i) start_thread(threads_, [this] { read_loop(); });
  } catch (...) {
    cancel();
    for (std::thread& thread : threads_) thread.join();
    throw;
  }
}

Reading::~Reading() {
  cancel();
  for (std::thread& thread : threads_) thread.join();
}

void Reading::cancel() {
  std::lock_guard<std::mutex> lock(mutex_);
  stopping_ = true;
  place_known_.notify_all();
}

void Reading::place(std::vector<FileRead> files) {
  if (files.size() != files_.size()) throw std::invalid_argument("these are other files");
  for (size_t i = 0; i < files.size(); ++i) {
    if (files[i].path != files_[i].path || files[i].nbytes != files_[i].nbytes)
      throw std::invalid_argument(files[i].path + " is not what is read");
    for (const Segment& segment : files[i].segments)
      if (segment.device != kHost)
        throw std::invalid_argument("devices are named at the beginning");
    check_segments(files[i]);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (placed_) throw std::invalid_argument("the places are known already");
  for (size_t i = 0; i < files.size(); ++i) files_[i].segments = std::move(files[i].segments);
  placed_ = true;
  place_known_.notify_all();
}

bool Reading::await_place() {
  std::unique_lock<std::mutex> lock(mutex_);
  place_known_.wait(lock, [&] { return placed_ || stopping_; });
  return placed_;
}

bool Reading::wait(double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  return finished_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                            [&] { return running_ == 0; });
}

ReadError Reading::error() {
  std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

void Reading::use_devices(const std::string& driver, const std::vector<CallerStream>& streams) {
  for (const CallerStream& stream : streams) {
    DeviceFailure failure;
    Device* const device = Device::get(driver, stream.device, &failure);
    if (device == nullptr) throw DeviceError(failure);
    devices_.push_back(device);
    cuda::Event event = nullptr;
    failure = device->acquire(&event);
    if (!failure) failure = device->record(stream.handle, event);
    if (!failure) failure = device->order_after(Device::Way::to_device, event);
    device->give_back(event);
    if (failure) throw DeviceError(failure);
  }
  for (const FileRead& file : files_)
    for (const Segment& segment : file.segments)
      if (segment.device != kHost &&
          std::none_of(streams.begin(), streams.end(),
                       [&](auto& stream) { return stream.device == segment.device; }))
        throw std::invalid_argument("no stream was given for device " +
                                    std::to_string(segment.device));
}

void Reading::read_loop() {
  { const std::lock_guard<std::mutex> all_are_there(mutex_); }
  uint64_t block = 0;
  ReadError error = read_all(&block);
  std::lock_guard<std::mutex> lock(mutex_);
  if (error.kind != ReadError::Kind::none) {
    stopping_ = true;
    place_known_.notify_all();
    if (block < error_at_) {
      error_at_ = block;
      error_ = std::move(error);
    }
  }
  if (--running_ == 0) finished_.notify_all();
}

// Reads blocks until there are no more, and returns once they have arrived; or the first error.
ReadError Reading::read_all(uint64_t* block) {
  const auto position = [&] {
    const auto after = std::upper_bound(first_block_.begin(), first_block_.end(), *block);
    return static_cast<size_t>(after - first_block_.begin()) - 1;
  };
  try {
    Buffers buffers(buffer_nbytes_, devices_);
    for (;;) {
      const uint64_t next = next_block_++;
      if (stopping_ || next >= first_block_.back()) break;
      *block = next;
      const size_t file = position();
      ReadError error = read_block(file, next - first_block_[file], buffers);
      if (error.kind != ReadError::Kind::none) return error;
      // Whoever is last to be done with a block of this file: nobody reads it any more.
      if (--opened_[file]->blocks_left == 0) opened_[file]->file.close();
    }
    for (int side = 0; side < 2; ++side)
      if (DeviceFailure failure = buffers.turn())
        return {ReadError::Kind::device, failure.operation, files_[position()].path, 0, 0, 0, 0,
                failure.reason};
  } catch (const std::bad_alloc&) {
    return {ReadError::Kind::os, "mmap", files_[position()].path, 0, ENOMEM, 0, 0, ""};
  }
  return {};
}

ReadError Reading::open(size_t index) {
  const FileRead& wanted = files_[index];
  ReadError error;
  std::call_once(opened_[index]->once, [&] {
    int error_number = opened_[index]->file.open(wanted.path, direct_);
    uint64_t nbytes = 0;
    if (error_number == 0) error_number = opened_[index]->file.size(&nbytes);
    if (error_number != 0) {
      opened_[index]->file.close();
      error = {ReadError::Kind::os, "open", wanted.path, 0, error_number, 0, 0, ""};
    } else if (nbytes != wanted.nbytes) {
      error = {ReadError::Kind::size, "stat", wanted.path, 0, 0, wanted.nbytes, nbytes, ""};
    }
  });
  return error;
}

ReadError Reading::read_block(size_t index, uint64_t block, Buffers& buffers) {
  const FileRead& file = files_[index];
  const uint64_t begin = block * file.block_nbytes;
  const auto nbytes = static_cast<size_t>(
      std::min<uint64_t>(file.block_nbytes, file.nbytes - std::min(begin, file.nbytes)));
  ReadError error = open(index);
  if (error.kind != ReadError::Kind::none || !opened_[index]->file.is_open()) return error;
  if (nbytes == 0) return {};
  const bool checked = !file.block_crcs.empty() && (index + block) % file.checkers == file.checker;
  const auto first_segment = [&] {
    return std::upper_bound(
        file.segments.begin(), file.segments.end(), begin,
        [](uint64_t offset, const Segment& s) { return offset < s.offset + s.nbytes; });
  };
  if (!checked) {
    if (!await_place()) return {};
    const auto segment = first_segment();
    const bool needed = segment != file.segments.end() && segment->offset < begin + nbytes;
    if (!needed) return {};
  }

  const auto refused = [&](const DeviceFailure& failure) {
    return ReadError{ReadError::Kind::device, failure.operation, file.path, block, 0, 0, 0,
                     failure.reason};
  };
  if (const DeviceFailure failure = buffers.turn()) return refused(failure);
  char* const buffer = buffers.data();
  const int error_number =
      opened_[index]->file.read(buffer, nbytes, round_up(nbytes, kDirectAlignment), begin);
  if (error_number == ENODATA)
    return {ReadError::Kind::size, "pread", file.path, block, 0, begin + nbytes, begin, ""};
  if (error_number != 0)
    return {ReadError::Kind::os, "pread", file.path, block, error_number, 0, 0, ""};
  if (!file.block_crcs.empty()) {
    const uint32_t crc = crc32(0, buffer, nbytes);
    if (crc != file.block_crcs[block])
      return {ReadError::Kind::crc, "crc32", file.path, block, 0, file.block_crcs[block], crc, ""};
  }
  if (!await_place()) return {};
  for (auto segment = first_segment();
       segment != file.segments.end() && segment->offset < begin + nbytes; ++segment) {
    const uint64_t from = std::max(begin, segment->offset);
    const uint64_t to = std::min<uint64_t>(begin + nbytes, segment->offset + segment->nbytes);
    if (segment->device != kHost) {
      buffers.add(*segment, from, to, begin);
      continue;
    }
    const auto target = static_cast<uintptr_t>(segment->address + (from - segment->offset));
    streaming_copy(reinterpret_cast<void*>(target), buffer + (from - begin),
                   static_cast<size_t>(to - from));
  }
  if (const DeviceFailure failure = buffers.send()) return refused(failure);
  return {};
}

}  // namespace asyncckpt
