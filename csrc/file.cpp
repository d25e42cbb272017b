#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "faults.h"

namespace asyncckpt {
namespace {

// open(2) with O_DIRECT first. A file system that cannot do it answers EINVAL.
int open_file(const std::string& path, int flags, bool* direct, int* fd) {
  for (;;) {
    const faults::Outcome fault = faults::check(faults::Op::open);
    if (fault.error_number) return fault.error_number;
    // O_NONBLOCK means nothing to a regular file; a pipe in its place must not hold us up.
    *fd = ::open(path.c_str(), flags | O_CLOEXEC | O_NONBLOCK | (*direct ? O_DIRECT : 0), 0666);
    if (*fd >= 0) return 0;
    if (errno == EINTR) continue;
    if (errno == EINVAL && *direct) {
      // An O_CREAT | O_EXCL open that fails this way may have left the empty file behind.
      if (flags & O_EXCL) ::unlink(path.c_str());
      *direct = false;
      continue;
    }
    return errno;
  }
}

bool aligned(uint64_t value) { return value % kDirectAlignment == 0; }

}  // namespace

int File::create(const std::string& path, uint64_t nbytes, bool shared, bool direct,
                 const char** operation) {
  *operation = "open";
  int error_number = open_file(path, O_WRONLY | O_CREAT | (shared ? 0 : O_EXCL), &direct, &fd_);
  if (error_number != 0) return error_number;
  direct_ = direct;
  *operation = "fallocate";
  error_number = allocate(nbytes);
  if (error_number != 0) close();
  return error_number;
}

int File::allocate(uint64_t nbytes) {
  if (nbytes == 0) return 0;
  // fallocate(2) and not posix_fallocate(3), which emulates by writing. Besides finding a full disk
  // early, it lets direct writes below the end of the file run in parallel.
  for (;;) {
    const faults::Outcome fault = faults::check(faults::Op::allocate);
    if (fault.error_number) return fault.error_number;
    if (::fallocate(fd_, 0, 0, static_cast<off_t>(nbytes)) == 0) return 0;
    if (errno == EINTR) continue;
    if (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL) return 0;
    return errno;
  }
}

int File::open(const std::string& path, bool direct) {
  const int error_number = open_file(path, O_RDONLY, &direct, &fd_);
  direct_ = direct;
  return error_number;
}

void File::close() {
  if (fd_ >= 0) ::close(fd_);  // all that matters was synced before; nothing to learn here
  fd_ = -1;
}

void File::make_buffered() {
  // Other threads may be writing through the same descriptor: for them too, buffered is correct.
  const int flags = ::fcntl(fd_, F_GETFL);
  if (flags >= 0) ::fcntl(fd_, F_SETFL, flags & ~O_DIRECT);
  direct_ = false;
}

int File::write(const void* data, size_t nbytes, size_t padded_nbytes, uint64_t offset,
                size_t* done) {
  const auto* bytes = static_cast<const char*>(data);
  *done = 0;
  while (*done < nbytes) {
    const bool direct = direct_ && aligned(offset + *done);
    if (direct_ && !direct) make_buffered();  // after a short write that ended off the grid
    size_t wanted = (direct ? padded_nbytes : nbytes) - *done;
    const faults::Outcome fault = faults::check(faults::Op::pwrite);
    if (fault.shortened && wanted > 1) wanted = direct ? kDirectAlignment : wanted / 2;
    ssize_t written = -1;
    if (fault.error_number != 0) errno = fault.error_number;
    else written = ::pwrite(fd_, bytes + *done, wanted, static_cast<off_t>(offset + *done));
    if (written < 0) {
      if (errno == EINTR) continue;
      if (errno == EINVAL && direct) {
        make_buffered();
        continue;
      }
      return errno;
    }
    if (written == 0) return EIO;  // pwrite of a positive count never returns 0 on a regular file
    *done += static_cast<size_t>(written);
  }
  if (*done > nbytes) *done = nbytes;
  return 0;
}

int File::read(void* data, size_t nbytes, size_t padded_nbytes, uint64_t offset) {
  auto* bytes = static_cast<char*>(data);
  size_t done = 0;
  while (done < nbytes) {
    const bool direct = direct_ && aligned(offset + done);
    if (direct_ && !direct) make_buffered();
    const size_t wanted = (direct ? padded_nbytes : nbytes) - done;
    const faults::Outcome fault = faults::check(faults::Op::pread);
    ssize_t got = -1;
    if (fault.error_number != 0) errno = fault.error_number;
    else got = ::pread(fd_, bytes + done, wanted, static_cast<off_t>(offset + done));
    if (got < 0) {
      if (errno == EINTR) continue;
      if (errno == EINVAL && direct) {
        make_buffered();
        continue;
      }
      return errno;
    }
    if (got == 0) return ENODATA;
    done += static_cast<size_t>(got);
  }
  return 0;
}

int File::truncate(uint64_t nbytes) {
  while (::ftruncate(fd_, static_cast<off_t>(nbytes)) != 0)
    if (errno != EINTR) return errno;
  return 0;
}

int File::sync() {
  for (;;) {
    const faults::Outcome fault = faults::check(faults::Op::fsync);
    if (fault.error_number) return fault.error_number;
    if (::fsync(fd_) == 0) return 0;
    // After a failed fsync the kernel may have dropped the dirty pages: a retry that succeeds
    // proves nothing. Only an interruption is tried again.
    if (errno != EINTR) return errno;
  }
}

int File::size(uint64_t* nbytes) const {
  struct stat info;
  if (::fstat(fd_, &info) != 0) return errno;
  *nbytes = static_cast<uint64_t>(info.st_size);
  return 0;
}

}  // namespace asyncckpt
