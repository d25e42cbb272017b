// Preloaded: writes down, in order, the system calls that durability hangs on.
//
// One line for each call that succeeded on a path below $RECORDER_ROOT, in the file $RECORDER_LOG:
//
//     begun <tab> ended <tab> operation <tab> path <tab> path renamed to, or nothing
//
// `begun` and `ended` are nanoseconds of the clock that all processes share, so "a ended before b began"
// can be told from "a and b overlapped", on whatever threads, of whatever processes, they ran. The path of a descriptor is the one it has at that moment.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PATH_NBYTES 4096

static int log_fd = -1;
static const char* root = "";

__attribute__((constructor)) static void begin(void) {
  const char* path = getenv("RECORDER_LOG");
  if (getenv("RECORDER_ROOT")) root = getenv("RECORDER_ROOT");
  if (path) {
    log_fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (log_fd < 0) abort();
  }
}

struct call {
  long begun;
  char path[PATH_NBYTES];
};

static long now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000L + now.tv_nsec;
}

static void path_of(int fd, char* path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t nbytes = readlink(link, path, PATH_NBYTES - 1);
  path[nbytes < 0 ? 0 : nbytes] = '\0';
}

static struct call on_path(const char* path) {
  struct call call;
  snprintf(call.path, sizeof call.path, "%s", path);
  call.begun = now_ns();
  return call;
}

static struct call on_fd(int fd) {
  char path[PATH_NBYTES];
  path_of(fd, path);
  return on_path(path);
}

// Hands `result` through, errno too.
static long ended(const struct call* call, long result, const char* operation, const char* other) {
  const int error_number = errno;
  if (result >= 0 && log_fd >= 0 && strncmp(call->path, root, strlen(root)) == 0) {
    char line[2 * PATH_NBYTES + 64];
    const int nbytes = snprintf(line, sizeof line, "%ld\t%ld\t%s\t%s\t%s\n", call->begun,
                                now_ns(), operation, call->path, other);
    if (syscall(SYS_write, log_fd, line, nbytes) != nbytes) abort();  // one write: lines do not mix
  }
  errno = error_number;
  return result;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define ON_FD(type, name, operation, parameters, ...)              \
  type name parameters {                                           \
    const struct call call = on_fd(fd);                            \
    return (type)ended(&call, NEXT(name)(__VA_ARGS__), operation, ""); \
  }

ON_FD(ssize_t, write, "write", (int fd, const void* data, size_t nbytes), fd, data, nbytes)
ON_FD(ssize_t, writev, "write", (int fd, const struct iovec* parts, int count), fd, parts, count)
ON_FD(ssize_t, pwrite, "write", (int fd, const void* data, size_t nbytes, off_t offset), fd, data,
      nbytes, offset)
ON_FD(ssize_t, pwrite64, "write", (int fd, const void* data, size_t nbytes, off64_t offset), fd, data,
      nbytes, offset)
ON_FD(ssize_t, pwritev, "write", (int fd, const struct iovec* parts, int count, off_t offset), fd,
      parts, count, offset)
ON_FD(int, ftruncate, "write", (int fd, off_t nbytes), fd, nbytes)
ON_FD(int, ftruncate64, "write", (int fd, off64_t nbytes), fd, nbytes)
ON_FD(int, fallocate, "write", (int fd, int mode, off_t offset, off_t nbytes), fd, mode, offset, nbytes)
ON_FD(int, fallocate64, "write", (int fd, int mode, off64_t offset, off64_t nbytes), fd, mode, offset,
      nbytes)
ON_FD(int, fsync, "sync", (int fd), fd)
ON_FD(int, fdatasync, "sync", (int fd), fd)

#define ON_PATH(name, operation, parameters, path, other, ...)       \
  int name parameters {                                              \
    const struct call call = on_path(path);                          \
    return (int)ended(&call, NEXT(name)(__VA_ARGS__), operation, other); \
  }

ON_PATH(rename, "rename", (const char* from, const char* to), from, to, from, to)
ON_PATH(renameat, "rename", (int from_fd, const char* from, int to_fd, const char* to), from, to,
        from_fd, from, to_fd, to)
ON_PATH(renameat2, "rename", (int from_fd, const char* from, int to_fd, const char* to, unsigned flags),
        from, to, from_fd, from, to_fd, to, flags)
ON_PATH(mkdir, "create", (const char* path, mode_t mode), path, "", path, mode)
ON_PATH(mkdirat, "create", (int fd, const char* path, mode_t mode), path, "", fd, path, mode)
ON_PATH(unlink, "delete", (const char* path), path, "", path)
ON_PATH(unlinkat, "delete", (int fd, const char* path, int flags), path, "", fd, path, flags)
ON_PATH(rmdir, "delete", (const char* path), path, "", path)

#define OPEN(name, parameters, last, ...)                           \
  int name parameters {                                             \
    va_list list;                                                   \
    va_start(list, last);                                           \
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
    va_end(list);                                                   \
    struct call call = on_path("");                                 \
    const int opened = NEXT(name)(__VA_ARGS__, mode);               \
    if (opened < 0 || !(flags & O_CREAT)) return opened;            \
    path_of(opened, call.path);                                     \
    return (int)ended(&call, opened, "create", "");                 \
  }

OPEN(open, (const char* path, int flags, ...), flags, path, flags)
OPEN(open64, (const char* path, int flags, ...), flags, path, flags)
OPEN(openat, (int fd, const char* path, int flags, ...), flags, fd, path, flags)
OPEN(openat64, (int fd, const char* path, int flags, ...), flags, fd, path, flags)
