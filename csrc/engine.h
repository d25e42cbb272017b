// The writing engine: jobs of file images, streamed through a bounded ring of chunks to disk.
//
// Guarantees
//   - A chunk is the bytes of the file at its own offset; its CRC-32 is that of the bytes written.
//   - Chunks are granted first-come by job: a later job gets none until an earlier one has claimed
//     all of its own, so two jobs in flight cannot starve each other.
//   - `released` comes when no source will be read again, whether the job succeeds or fails;
//     `finished` when no thread works for the job any more, all its data synced if it succeeded.
//   - A job that fails keeps its first error and stops early. The engine goes on with the others.
//   - Memory: the arena and nothing that grows with the state.
//
// Threads: copiers fill chunks and do nothing else, since that is what training waits for. Writers
// checksum the filled ones, seal them in file order (fix-ups, CRCs that need earlier ones), write
// them and sync the files; they run at a lower priority, so that on few cores copying goes first.
//
// This file knows files, extents and addresses, and nothing of Python or torch.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <sys/types.h>

#include "arena.h"
#include "file.h"
#include "image.h"

namespace asyncckpt {

struct Source {
  uint64_t address;
  uint64_t nbytes;
};

struct JobError {
  std::string operation;  // "pwrite", "copy", ...
  std::string path;
  int64_t offset = -1;   // in the file; -1 when it does not apply
  int64_t source = -1;   // whose bytes could not be read; -1 when it does not apply
  int error_number = 0;  // 0 when there is no error
};

struct JobTimes {  // seconds since submit(); negative when it has not happened
  double released_s = -1;
  double written_s = -1;   // last byte handed to the kernel
  double finished_s = -1;  // last file synced
  double starved_s = 0;    // copiers' wait for a free chunk: the disk's backpressure
};

class Engine;

class Job {
 public:
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  // Each waits until the phase is reached or the time is up; true when it was reached.
  bool wait_released(double timeout_s);
  bool wait_finished(double timeout_s);

  // Gives the job up: it fails with operation "abort" unless it has finished or failed before.
  void abort();

  bool released();
  bool finished();
  JobError error();
  JobTimes times();
  bool direct();  // whether every file was written with O_DIRECT

  // Valid once finished without error.
  const std::vector<uint32_t>& block_crcs(size_t file) const { return files_[file]->block_crcs; }
  const std::vector<uint32_t>& record_crcs(size_t file) const { return files_[file]->record_crcs; }
  size_t files() const { return files_.size(); }
  const FileImage& image(size_t file) const { return *files_[file]->image; }

 private:
  friend class Engine;

  struct Piece {  // a run of bytes in a chunk that belongs to one extent
    size_t offset_in_chunk;
    size_t nbytes;
    int64_t record;
    uint32_t crc;  // of a record's bytes; literals are checksummed when the chunk is sealed
  };
  struct Chunk {
    size_t file;
    uint64_t index;  // in the file
    size_t buffer;   // in the arena
    size_t nbytes;
    std::vector<Piece> pieces;
  };
  struct FileState {
    std::shared_ptr<const FileImage> image;
    std::string path;
    File file;
    std::mutex opening;  // the first writer that comes opens the file, the others wait here
    bool was_opened = false;
    int open_error = 0;
    const char* open_operation = "";
    uint64_t chunks = 0;  // a file of no bytes still has one chunk, of no bytes
    uint64_t claimed = 0;
    uint64_t sealed = 0;
    uint64_t written = 0;
    bool sealing = false;                         // one thread at a time seals a file
    std::deque<std::unique_ptr<Chunk>> unsealed;  // checksummed, waiting for an earlier one; sorted
    std::vector<uint32_t> block_crcs;
    std::vector<uint32_t> record_crcs;
  };

  Job(Engine* engine, std::string directory, std::vector<std::shared_ptr<const FileImage>> images,
      std::vector<Source> sources, size_t chunk_nbytes);

  Engine* engine_;
  std::vector<Source> sources_;
  std::vector<std::unique_ptr<FileState>> files_;
  // All below is guarded by Engine::mutex_.
  size_t claiming_file_ = 0;
  size_t outstanding_chunks_ = 0;  // claimed and not yet given back
  size_t filling_ = 0;
  size_t unfinished_files_ = 0;
  bool all_claimed_ = false;
  bool failed_ = false;
  bool released_ = false;
  bool finished_ = false;
  bool direct_ = true;
  JobError error_;
  JobTimes times_;
  double submitted_s_ = 0;
};

struct EngineOptions {
  size_t arena_nbytes = size_t{1} << 30;  // rounded down to whole chunks, at least one
  size_t chunk_nbytes = size_t{4} << 20;  // also the size of a CRC block; a multiple of 4096
  unsigned copiers = 1;
  unsigned writers = 4;
  bool direct = true;    // try O_DIRECT
  bool prefault = true;  // make the arena's pages present in the background
};

class Engine {
 public:
  explicit Engine(const EngineOptions& options);
  // As close(). Not to be run in a forked child: leak it there.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Sources must stay readable until the job is released. `directory` must exist, the files must not.
  std::shared_ptr<Job> submit(std::string directory,
                              std::vector<std::shared_ptr<const FileImage>> images,
                              std::vector<Source> sources);

  // Aborts what is in flight, so that every job finishes, and joins the threads. Idempotent.
  void close();

  bool forked() const;  // true in a child of the process that made the engine: it has no threads
  size_t arena_nbytes() const { return arena_.nbytes(); }
  size_t chunk_nbytes() const { return arena_.chunk_nbytes(); }
  double prefault_s() const { return prefault_s_; }  // negative until done

 private:
  friend class Job;
  using JobPtr = std::shared_ptr<Job>;
  struct Task {
    JobPtr job;
    std::unique_ptr<Job::Chunk> chunk;
  };

  void copy_loop();
  void write_loop();
  int fill(Job& job, Job::Chunk& chunk, int64_t* failed_source, uint64_t* failed_offset);
  void checksum(Task task, std::unique_lock<std::mutex>& lock);
  void seal_ready(const JobPtr& job, size_t file, std::unique_lock<std::mutex>& lock);
  void seal(Job::FileState& file, Job::Chunk& chunk);
  void write_out(Task task, std::unique_lock<std::mutex>& lock);
  int write(Job& job, Job::Chunk& chunk, std::string* operation, uint64_t* offset);
  // The rest expects mutex_ to be held.
  void fail(Job& job, JobError error);
  void give_back(Job& job, std::unique_ptr<Job::Chunk> chunk);
  void advance(Job& job);

  Arena arena_;
  const bool direct_;
  const pid_t owner_;
  std::mutex mutex_;
  std::condition_variable work_for_copiers_;
  std::condition_variable work_for_writers_;
  std::condition_variable phase_changed_;
  std::deque<JobPtr> to_fill_;
  std::deque<Task> to_checksum_;
  std::deque<Task> to_write_;
  std::vector<size_t> free_buffers_;
  std::vector<JobPtr> unfinished_;
  bool stopping_ = false;
  std::atomic<bool> stop_prefault_{false};
  std::atomic<double> prefault_s_{-1};
  std::vector<std::thread> threads_;
};

}  // namespace asyncckpt
