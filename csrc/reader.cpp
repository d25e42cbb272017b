#include "reader.h"

#include <errno.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "crc32.h"
#include "threads.h"

namespace asyncckpt {

Reading::Reading(std::vector<FileRead> files, unsigned threads, bool direct)
    : files_(std::move(files)), direct_(direct) {
  uint64_t total = 0;
  for (const FileRead& file : files_) {
    if (file.block_nbytes == 0 || file.block_nbytes % kDirectAlignment != 0)
      throw std::invalid_argument(file.path + ": block size is not a multiple of 4096");
    const uint64_t blocks = (file.nbytes + file.block_nbytes - 1) / file.block_nbytes;
    if (!file.block_crcs.empty() && file.block_crcs.size() != blocks)
      throw std::invalid_argument(file.path + ": needs one CRC for each of its blocks");
    uint64_t end = 0;
    for (const Segment& segment : file.segments) {
      if (segment.offset < end || segment.nbytes > file.nbytes ||
          segment.offset > file.nbytes - segment.nbytes)
        throw std::invalid_argument(file.path + ": segments overlap or leave the file");
      end = segment.offset + segment.nbytes;
    }
    first_block_.push_back(total);
    // A file of no bytes has no block, but it must be looked at: it may have grown.
    total += std::max<uint64_t>(1, blocks);
    buffer_nbytes_ = std::max<size_t>(buffer_nbytes_, file.block_nbytes);
    opened_.push_back(std::make_unique<Opened>());
  }
  first_block_.push_back(total);
  running_ = static_cast<size_t>(std::min<uint64_t>(std::max(1u, threads), total));
  const size_t wanted = running_;
  try {
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

void Reading::cancel() { stopping_ = true; }

bool Reading::wait(double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  return finished_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                            [&] { return running_ == 0; });
}

ReadError Reading::error() {
  std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

void Reading::read_loop() {
  void* memory =
      ::mmap(nullptr, buffer_nbytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory != MAP_FAILED) {
    ::madvise(memory, buffer_nbytes_, MADV_DONTFORK);  // as in arena.h
    ::madvise(memory, buffer_nbytes_, MADV_HUGEPAGE);
  }
  for (;;) {
    const uint64_t block = next_block_++;
    if (stopping_ || block >= first_block_.back()) break;
    const auto after = std::upper_bound(first_block_.begin(), first_block_.end(), block);
    const auto file = static_cast<size_t>(after - first_block_.begin()) - 1;
    ReadError error =
        memory == MAP_FAILED
            ? ReadError{ReadError::Kind::os, "mmap", files_[file].path, 0, ENOMEM, 0, 0}
            : read_block(file, block - first_block_[file], static_cast<char*>(memory));
    if (error.kind == ReadError::Kind::none) continue;
    stopping_ = true;
    std::lock_guard<std::mutex> lock(mutex_);
    if (block < error_at_) {
      error_at_ = block;
      error_ = std::move(error);
    }
  }
  if (memory != MAP_FAILED) ::munmap(memory, buffer_nbytes_);
  std::lock_guard<std::mutex> lock(mutex_);
  if (--running_ == 0) finished_.notify_all();
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
      error = {ReadError::Kind::os, "open", wanted.path, 0, error_number, 0, 0};
    } else if (nbytes != wanted.nbytes) {
      error = {ReadError::Kind::size, "stat", wanted.path, 0, 0, wanted.nbytes, nbytes};
    }
  });
  return error;
}

ReadError Reading::read_block(size_t index, uint64_t block, char* buffer) {
  const FileRead& file = files_[index];
  const uint64_t begin = block * file.block_nbytes;
  const auto nbytes = static_cast<size_t>(
      std::min<uint64_t>(file.block_nbytes, file.nbytes - std::min(begin, file.nbytes)));
  auto segment = std::upper_bound(
      file.segments.begin(), file.segments.end(), begin,
      [](uint64_t offset, const Segment& s) { return offset < s.offset + s.nbytes; });
  const bool needed = segment != file.segments.end() && segment->offset < begin + nbytes;
  ReadError error = open(index);
  if (error.kind != ReadError::Kind::none || !opened_[index]->file.is_open()) return error;
  if (nbytes == 0 || (!needed && file.block_crcs.empty())) return {};

  const int error_number =
      opened_[index]->file.read(buffer, nbytes, round_up(nbytes, kDirectAlignment), begin);
  if (error_number == ENODATA)
    return {ReadError::Kind::size, "pread", file.path, block, 0, begin + nbytes, begin};
  if (error_number != 0)
    return {ReadError::Kind::os, "pread", file.path, block, error_number, 0, 0};
  if (!file.block_crcs.empty()) {
    const uint32_t crc = crc32(0, buffer, nbytes);
    if (crc != file.block_crcs[block])
      return {ReadError::Kind::crc, "crc32", file.path, block, 0, file.block_crcs[block], crc};
  }
  for (; segment != file.segments.end() && segment->offset < begin + nbytes; ++segment) {
    const uint64_t from = std::max(begin, segment->offset);
    const uint64_t to = std::min<uint64_t>(begin + nbytes, segment->offset + segment->nbytes);
    std::memcpy(reinterpret_cast<void*>(
                    static_cast<uintptr_t>(segment->address + (from - segment->offset))),
                buffer + (from - begin), static_cast<size_t>(to - from));
  }
  return {};
}

}  // namespace asyncckpt
