// The reading engine: files -> memory, every block checked against its CRC-32 in the same pass.
//
// A block on its way to a device leaves its buffer while the next one is read and checked in another.
// A reading can begin before it is known where the bytes go: what has to be checked anyhow is read and
// checked, as far as there are buffers, and waits in them for its place.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "device.h"
#include "file.h"

namespace asyncckpt {

struct Segment {  // bytes of a file and where they go
  uint64_t offset;
  uint64_t nbytes;
  uint64_t address;
  int device = kHost;  // or a CUDA ordinal
};

struct FileRead {
  std::string path;
  uint64_t nbytes = 0;        // expected size of the file
  uint64_t block_nbytes = 0;  // a multiple of 4096
  // One for each block of the file: then every block is read and checked, needed or not. Empty: only
  // blocks with segments are read, unchecked.
  std::vector<uint32_t> block_crcs;
  // Of the blocks that are not needed, one in `checkers` is read: others read the rest.
  unsigned checkers = 1;
  unsigned checker = 0;
  std::vector<Segment> segments;  // sorted by offset, not overlapping in the file
};

struct ReadError {
  enum class Kind { none, os, size, crc, device } kind = Kind::none;
  std::string operation;
  std::string path;
  uint64_t block = 0;
  int error_number = 0;
  uint64_t expected = 0;
  uint64_t got = 0;
  std::string reason;  // what a device's driver says
};

// Runs in threads of its own until it ends, fails or is cancelled; it stops at the first error.
// A block's bytes reach their targets only after the block was found good; those on devices after
// what the caller's stream of that device had to do, and before the reading is over.
class Reading {
 public:
  // Unless `placed`, the files have no segments yet, and place() follows; there are no devices then.
  Reading(std::vector<FileRead> files, unsigned threads, bool direct, bool placed = true,
          const std::string& driver = "", const std::vector<CallerStream>& streams = {});
  ~Reading();  // cancels and joins
  Reading(const Reading&) = delete;
  Reading& operator=(const Reading&) = delete;

  // Says once where the bytes go: the segments of `files`, which are otherwise those of the constructor.
  void place(std::vector<FileRead> files);
  bool wait(double timeout_s);  // true when no thread works any more
  void cancel();
  ReadError error();  // of those found, the one in the lowest block of the first file

 private:
  struct Opened {
    File file;
    std::once_flag once;
    std::atomic<uint64_t> blocks_left{
        0};  // closed with the last, so that few files are open at once
  };

  class Buffers;

  bool await_place();  // false if there will be none
  void use_devices(const std::string& driver, const std::vector<CallerStream>& streams);
  void read_loop();
  ReadError read_all(uint64_t* block);
  ReadError read_block(size_t file, uint64_t block, Buffers& buffers);
  ReadError open(size_t file);

  std::vector<FileRead> files_;
  std::vector<std::unique_ptr<Opened>> opened_;
  std::vector<uint64_t>
      first_block_;  // of each file, in one numbering over all files; plus the total
  const bool direct_;
  std::vector<Device*> devices_;
  size_t buffer_nbytes_ = 0;
  std::atomic<uint64_t> next_block_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable finished_;
  std::condition_variable place_known_;
  bool placed_;
  size_t running_ = 0;
  uint64_t error_at_ = UINT64_MAX;
  ReadError error_;
  std::vector<std::thread> threads_;
};

}  // namespace asyncckpt
