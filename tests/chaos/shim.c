/* File operations below one folder: counted, written down, made to fail, or made the last of the process.
 *
 * Loaded with LD_PRELOAD; does nothing until chaos_arm() is called. Every operation that changes what is on the disk
 * (open that creates or cuts, write, truncate, fsync, rename, unlink, mkdir, rmdir) gets a number from 0 on.
 *
 *   chaos_arm(root, log, strike, action)   log: file to write operations to ("" for none), see crash_points.py
 *                                          strike: number of the operation to act on (-1: none)
 *                                          action: 0 none; an errno: this and every later operation fails with it;
 *                                          -errno: only this one fails; 10000: kill before it; 10001: kill after it
 *   chaos_clock(seconds, period)           the wall clock is off by `seconds`, to and fro every `period` calls if > 0
 *   chaos_count()                          how many operations there were
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { CREATE = 1, CUT, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, MKDIR, RMDIR };

static char root[PATH_MAX];
static size_t root_length;
static long strike = -1, action, count;
static int log_fd = -1;
static long clock_off, clock_period, clock_calls;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(type, name) \
    static type real; \
    if (!real) real = (type)dlsym(RTLD_NEXT, name)

void chaos_arm(const char *folder, const char *log, long at, long what) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    strike = at, action = what, count = 0;
    if (log[0]) log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0600);
}

void chaos_clock(long seconds, long period) { clock_off = seconds, clock_period = period; }

long chaos_count(void) { return count; }

static int below(const char *path) {
    return root_length && path && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static const char *absolute(int folder, const char *path, char *buffer) {
    char link[64], start[PATH_MAX];
    ssize_t length;
    if (path[0] == '/') return path;
    if (folder == AT_FDCWD) {
        if (!getcwd(start, sizeof start)) return NULL;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        if ((length = readlink(link, start, sizeof start - 1)) < 0) return NULL;
        start[length] = 0;
    }
    if (!path[0]) return strcpy(buffer, start);
    if (strlen(start) + strlen(path) + 2 > PATH_MAX) return NULL;
    strcpy(buffer, start), strcat(buffer, "/"), strcat(buffer, path);
    return buffer;
}

static void put(int op, const char *path, const char *other, int64_t offset, const void *bytes, uint32_t size) {
    struct { uint32_t op, path, other, size; int64_t offset; } head = {
        op, strlen(path), other ? strlen(other) : 0, bytes ? size : 0, offset};
    struct iovec parts[4] = {{&head, sizeof head}, {(void *)path, head.path}, {(void *)other, head.other},
                             {(void *)bytes, head.size}};
    syscall(SYS_writev, log_fd, parts, 4);
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

/* Returns 1 when the operation is to fail (errno is set), else 0; the lock is held between before() and after(). */
static int before(void) {
    pthread_mutex_lock(&lock);
    if (strike < 0 || !action) return 0;
    if (action == 10000 && count == strike) die();
    if ((action > 0 && action < 10000 && count >= strike) || (action < 0 && count == strike)) {
        count++;
        errno = (int)(action < 0 ? -action : action);
        pthread_mutex_unlock(&lock);
        return 1;
    }
    return 0;
}

static void after(int good, int op, const char *path, const char *other, int64_t offset, const void *bytes,
                  uint32_t size) {
    int saved = errno;
    if (good && log_fd >= 0) put(op, path, other, offset, bytes, size);
    if (action == 10001 && count == strike) die();
    count++;
    pthread_mutex_unlock(&lock);
    errno = saved;
}

static int opened(int folder, const char *path, int flags, mode_t mode) {
    char buffer[PATH_MAX];
    const char *full = root_length ? absolute(folder, path, buffer) : NULL;
    struct stat seen;
    int is_new, fd;
    if (!below(full) || !(flags & (O_CREAT | O_TRUNC))) return (int)syscall(SYS_openat, folder, path, flags, mode);
    is_new = stat(full, &seen) != 0;
    if (!is_new && !(flags & O_TRUNC)) return (int)syscall(SYS_openat, folder, path, flags, mode);
    if (before()) return -1;
    fd = (int)syscall(SYS_openat, folder, path, flags, mode);
    after(fd >= 0, is_new ? CREATE : CUT, full, NULL, 0, NULL, 0);
    return fd;
}

#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }
int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }

static const char *path_of(int fd, char *buffer) {
    const char *path = root_length && fd > 2 ? absolute(fd, "", buffer) : NULL;
    return below(path) ? path : NULL;
}

ssize_t write(int fd, const void *bytes, size_t size) {
    char buffer[PATH_MAX];
    const char *path = path_of(fd, buffer);
    if (!path) return syscall(SYS_write, fd, bytes, size);
    if (before()) return -1;
    off_t offset = lseek(fd, 0, SEEK_CUR);
    ssize_t done = syscall(SYS_write, fd, bytes, size);
    after(done > 0, WRITE, path, NULL, offset, bytes, done > 0 ? done : 0);
    return done;
}

static ssize_t written_at(int fd, const void *bytes, size_t size, off_t offset) {
    char buffer[PATH_MAX];
    const char *path = path_of(fd, buffer);
    if (!path) return syscall(SYS_pwrite64, fd, bytes, size, offset);
    if (before()) return -1;
    ssize_t done = syscall(SYS_pwrite64, fd, bytes, size, offset);
    after(done > 0, WRITE, path, NULL, offset, bytes, done > 0 ? done : 0);
    return done;
}
ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset) { return written_at(fd, bytes, size, offset); }
ssize_t pwrite64(int fd, const void *bytes, size_t size, off_t offset) { return written_at(fd, bytes, size, offset); }

static int cut(int fd, off_t size) {
    char buffer[PATH_MAX];
    const char *path = path_of(fd, buffer);
    if (!path) return (int)syscall(SYS_ftruncate, fd, size);
    if (before()) return -1;
    int done = (int)syscall(SYS_ftruncate, fd, size);
    after(!done, TRUNCATE, path, NULL, size, NULL, 0);
    return done;
}
int ftruncate(int fd, off_t size) { return cut(fd, size); }
int ftruncate64(int fd, off_t size) { return cut(fd, size); }

static int synced(int fd, long call) {
    char buffer[PATH_MAX];
    const char *path = path_of(fd, buffer);
    if (!path) return (int)syscall(call, fd);
    if (before()) return -1;
    int done = (int)syscall(call, fd);
    after(!done, SYNC, path, NULL, 0, NULL, 0);
    return done;
}
int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

int rename(const char *from, const char *to) {
    char one[PATH_MAX], two[PATH_MAX];
    const char *a = root_length ? absolute(AT_FDCWD, from, one) : NULL, *b = a ? absolute(AT_FDCWD, to, two) : NULL;
    if (!below(a) && !below(b)) return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    if (before()) return -1;
    int done = (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    after(!done, RENAME, a, b, 0, NULL, 0);
    return done;
}

static int removed(int folder, const char *path, int flags) {
    char buffer[PATH_MAX];
    const char *full = root_length ? absolute(folder, path, buffer) : NULL;
    if (!below(full)) return (int)syscall(SYS_unlinkat, folder, path, flags);
    if (before()) return -1;
    int done = (int)syscall(SYS_unlinkat, folder, path, flags);
    after(!done, flags & AT_REMOVEDIR ? RMDIR : UNLINK, full, NULL, 0, NULL, 0);
    return done;
}
int unlink(const char *path) { return removed(AT_FDCWD, path, 0); }
int unlinkat(int folder, const char *path, int flags) { return removed(folder, path, flags); }
int rmdir(const char *path) { return removed(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdir(const char *path, mode_t mode) {
    char buffer[PATH_MAX];
    const char *full = root_length ? absolute(AT_FDCWD, path, buffer) : NULL;
    if (!below(full)) return (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
    if (before()) return -1;
    int done = (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
    after(!done, MKDIR, full, NULL, 0, NULL, 0);
    return done;
}

static long off(void) {
    long calls = __sync_fetch_and_add(&clock_calls, 1);
    return clock_period > 0 && calls / clock_period % 2 ? 0 : clock_off;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int done = (int)syscall(SYS_clock_gettime, clock, now);
    if (!done && clock_off && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += off();
    return done;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int done = (int)syscall(SYS_gettimeofday, now, zone);
    if (!done && clock_off) now->tv_sec += off();
    return done;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
