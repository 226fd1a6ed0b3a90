/* Faults at the write points of one folder, for benchmarks/train_faults.py: a library to preload.

   A write point is a call that changes a file below the folder: open with O_CREAT, mkdir, write, pwrite, writev, fsync,
   fdatasync, rename. `fault_arm` counts down to one of them, in this process and without its children's count. The silent
   kinds count writes of checkpoints and token shards alone: nothing else is checked when it is read. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, KILL, DISK_FULL, IO_ERROR, TRUNCATED, FLIPPED, ZEROED };

static char folder[PATH_MAX], mark[PATH_MAX];
static int kind = NONE, is_struck;
static long left = -1, counted;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) __typeof__(&name) real_##name = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* Strikes at write point number `at` (1-based) below `path`; then the file `fired` is there. */
void fault_arm(const char *path, long at, int which, const char *fired) {
    snprintf(folder, sizeof folder, "%s", path);
    snprintf(mark, sizeof mark, "%s", fired);
    left = at, kind = which, counted = 0, is_struck = 0;
}

long fault_count(void) { return counted; }

static int is_below(const char *path) { return *folder && !strncmp(path, folder, strlen(folder)); }

static int is_checked(const char *path) { return strstr(path, "checkpoints/") || strstr(path, "shards"); }

static void strike(void) {
    is_struck = 1;
    syscall(SYS_close, syscall(SYS_openat, AT_FDCWD, mark, O_CREAT | O_WRONLY, 0644));
    if (kind == KILL) syscall(SYS_kill, getpid(), SIGKILL);
}

/* What happens at a write point of `path`: the kind of fault, or NONE. */
static int at_point(const char *path, int is_write) {
    if (!is_below(path)) return NONE;
    int is_silent = kind >= TRUNCATED, verdict = NONE;
    pthread_mutex_lock(&lock);
    if (is_silent && !(is_write && is_checked(path))) {
        pthread_mutex_unlock(&lock);
        return NONE;
    }
    counted++;
    if (left > 0 && --left == 0) {
        strike();
        verdict = kind;
    } else if (is_struck && !is_silent) {
        verdict = kind; /* a disk stays full, and a broken one broken */
    }
    pthread_mutex_unlock(&lock);
    if (verdict == DISK_FULL) errno = ENOSPC;
    if (verdict == IO_ERROR) errno = EIO;
    return verdict;
}

static int at_file(int fd, int is_write) {
    if (!*folder) return NONE;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return NONE;
    path[length] = 0;
    return at_point(path, is_write);
}

static int is_error(int verdict) { return verdict == DISK_FULL || verdict == IO_ERROR; }

/* The bytes that reach the disk in the place of those that were written; *size is shortened for TRUNCATED. */
static void *spoiled(int verdict, const void *bytes, size_t *size) {
    char *copy = malloc(*size + 1);
    memcpy(copy, bytes, *size);
    if (verdict == FLIPPED && *size) copy[*size / 2] ^= 1;
    if (verdict == ZEROED) memset(copy, 0, *size);
    if (verdict == TRUNCATED) *size /= 2;
    return copy;
}

ssize_t write(int fd, const void *bytes, size_t size) {
    REAL(write);
    int verdict = at_file(fd, 1);
    if (is_error(verdict)) return -1;
    if (verdict < TRUNCATED) return real_write(fd, bytes, size);
    size_t kept = size;
    void *other = spoiled(verdict, bytes, &kept);
    if (kept) real_write(fd, other, kept);
    free(other);
    return (ssize_t)size;
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t at) {
    REAL(pwrite64);
    int verdict = at_file(fd, 1);
    return is_error(verdict) ? -1 : real_pwrite64(fd, bytes, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    return is_error(at_file(fd, 0)) ? -1 : real_writev(fd, parts, count);
}

int fsync(int fd) {
    REAL(fsync);
    return is_error(at_file(fd, 0)) ? -1 : real_fsync(fd);
}

int fdatasync(int fd) {
    REAL(fdatasync);
    return is_error(at_file(fd, 0)) ? -1 : real_fdatasync(fd);
}

int rename(const char *old, const char *new) {
    REAL(rename);
    return is_error(at_point(new, 0)) ? -1 : real_rename(old, new);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return is_error(at_point(path, 0)) ? -1 : real_mkdir(path, mode);
}

#define OPEN(name)                                                                     \
    int name(const char *path, int flags, ...) {                                       \
        REAL(name);                                                                    \
        va_list more;                                                                  \
        va_start(more, flags);                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;        \
        va_end(more);                                                                  \
        if (flags & O_CREAT && is_error(at_point(path, 0))) return -1;                 \
        return real_##name(path, flags, mode);                                         \
    }
OPEN(open)
OPEN(open64)
