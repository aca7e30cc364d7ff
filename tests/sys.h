/* Every system call of llmcb.h behind a hook: counted by name, failing on
 * demand, on a clock that a test can move. To be included before llmcb.h; a
 * call that has no hook here does not compile. A program that is linked with
 * sys.c (see impl.h) has the hooks there.
 *
 * A fault behaves like the real one: a close that fails has closed, a reset
 * connection stays reset, a name that failed gave no addresses. */
#ifndef SYS_H
#define SYS_H

#if !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__) && !defined(LLMCB_NO_EPOLL)
#include <sys/epoll.h>
#endif

/* read and write are several: what they may say depends on what it is. */
#define SYS_CALLS(X)  \
    X(open)           \
    X(read_wake)      \
    X(read_random)    \
    X(read_file)      \
    X(write_wake)     \
    X(write_file)     \
    X(close)          \
    X(pipe)           \
    X(fcntl)          \
    X(fstat)          \
    X(epoll_create1)  \
    X(epoll_ctl)      \
    X(epoll_wait)     \
    X(poll)           \
    X(pthread_create) \
    X(pthread_init)   \
    X(socket)         \
    X(setsockopt)     \
    X(getsockopt)     \
    X(connect)        \
    X(getpeername)    \
    X(send)           \
    X(recv)           \
    X(getaddrinfo)
#define SYS_ID(name) SYS_##name,
typedef enum sys_call { SYS_CALLS(SYS_ID) SYS_N } sys_call;
#define SYS_NAME(name) #name,
static const char *const sys_names[] = { SYS_CALLS(SYS_NAME) "none" };

#define SYS_SHORT (-1) /* no error: one byte is read or written */
#define SYS_GUARD_MS 3000
#define SYS_STILL 1700000000 /* Tue, 14 Nov 2023 22:13:20 GMT, and 0.3 s */

typedef struct sys_state {
    pthread_mutex_t lock;
    long calls[SYS_N];
    /* The fault: the at-th call of this name, from 1, 0: none. */
    sys_call call;
    long at;
    bool for_ever;
    int error;
    long struck;
    /* What the library holds. */
    int fds, threads;
    bool fd[1024];
    long unknown_closes; /* of what was not open */
    /* Clocks. */
    int64_t mono_ms, wall_s;
    int64_t step_ms;     /* later by this at each reading */
    bool still;          /* they stand at SYS_STILL, but for these two */
    bool hung;           /* a wait without end in which nothing came */
    long blocking_opens; /* of what may never open */
} sys_state;
extern sys_state sys;

/* What a test wants a name to be: addresses, dead ones first. */
typedef struct sys_host {
    const char *host;
    int ports[4];
    int n, asked;
    void (*wait)(void); /* what resolving it takes */
} sys_host;
extern sys_host sys_names_of;

static inline void sys_plan(sys_call call, long at, bool for_ever, int error)
{
    pthread_mutex_lock(&sys.lock);
    memset(sys.calls, 0, sizeof sys.calls);
    sys.call = call;
    sys.at = at;
    sys.for_ever = for_ever;
    sys.error = error;
    sys.struck = 0;
    sys.hung = false;
    pthread_mutex_unlock(&sys.lock);
}

static inline void sys_calm(void)
{
    pthread_mutex_lock(&sys.lock);
    sys.at = 0;
    pthread_mutex_unlock(&sys.lock);
}

static inline long sys_struck(void)
{
    long n;

    pthread_mutex_lock(&sys.lock);
    n = sys.struck;
    pthread_mutex_unlock(&sys.lock);
    return n;
}

#ifndef TEST_LINKED
sys_state sys = { .lock = PTHREAD_MUTEX_INITIALIZER };
sys_host sys_names_of;

/* The error of this call; 0: it is a real one. */
static inline int sys_fault(sys_call call)
{
    int error = 0;
    long n;

    pthread_mutex_lock(&sys.lock);
    n = ++sys.calls[call];
    if (sys.at && sys.call == call &&
        (n == sys.at || (sys.for_ever && n > sys.at))) {
        error = sys.error;
        sys.struck++;
    }
    pthread_mutex_unlock(&sys.lock);
    if (error > 0) errno = error;
    return error;
}

static inline int sys_opened(int fd)
{
    if (fd < 0) return fd;
    pthread_mutex_lock(&sys.lock);
    if (fd < 1024) sys.fd[fd] = true;
    sys.fds++;
    pthread_mutex_unlock(&sys.lock);
    return fd;
}

static inline int sys_open(const char *path, int flags, ...)
{
    struct stat st;

    if (sys_fault(SYS_open)) return -1;
    if (stat(path, &st) == 0 && S_ISFIFO(st.st_mode) && !(flags & O_NONBLOCK)) {
        sys.blocking_opens++;
        flags |= O_NONBLOCK;
    }
    return sys_opened(open(path, flags, 0600));
}

static inline bool sys_is(int fd, mode_t type)
{
    struct stat st;

    return fstat(fd, &st) == 0 && (st.st_mode & S_IFMT) == type;
}

static inline ssize_t sys_read(int fd, void *buf, size_t len)
{
    int e = sys_fault(sys_is(fd, S_IFIFO)   ? SYS_read_wake
                      : sys_is(fd, S_IFCHR) ? SYS_read_random
                                            : SYS_read_file);

    if (e > 0) return -1;
    return read(fd, buf, e == SYS_SHORT && len ? 1 : len);
}

static inline ssize_t sys_write(int fd, const void *buf, size_t len)
{
    int e = sys_fault(sys_is(fd, S_IFIFO) ? SYS_write_wake : SYS_write_file);

    if (e > 0) return -1;
    return write(fd, buf, e == SYS_SHORT && len ? 1 : len);
}

static inline int sys_close(int fd)
{
    int e = sys_fault(SYS_close), result;

    pthread_mutex_lock(&sys.lock);
    if (fd < 0 || fd >= 1024 || !sys.fd[fd])
        sys.unknown_closes++;
    else
        sys.fd[fd] = false;
    sys.fds--;
    pthread_mutex_unlock(&sys.lock);
    result = close(fd);
    if (!e) return result;
    errno = e;
    return -1;
}

static inline int sys_pipe(int fds[2])
{
    int result = sys_fault(SYS_pipe) ? -1 : pipe(fds);

    if (result == 0) {
        sys_opened(fds[0]);
        sys_opened(fds[1]);
    }
    return result;
}

static inline int sys_fcntl_(int fd, int what, int value)
{
    return sys_fault(SYS_fcntl) ? -1 : fcntl(fd, what, value);
}
#define SYS_FCNTL(fd, what, value, ...) sys_fcntl_(fd, what, value)
#define sys_fcntl(...) SYS_FCNTL(__VA_ARGS__, 0, 0)

static inline int sys_fstat(int fd, struct stat *st)
{
    return sys_fault(SYS_fstat) ? -1 : fstat(fd, st);
}

static inline int sys_clock_gettime(clockid_t id, struct timespec *ts)
{
    int result = clock_gettime(id, ts);

    if (sys.still) {
        ts->tv_sec = SYS_STILL;
        ts->tv_nsec = 300000000;
    }
    if (id == CLOCK_REALTIME) {
        ts->tv_sec += (time_t)sys.wall_s;
    } else {
        if (sys.step_ms) sys.mono_ms += sys.step_ms;
        ts->tv_sec += (time_t)(sys.mono_ms / 1000);
        ts->tv_nsec += (long)(sys.mono_ms % 1000) * 1000000;
        if (ts->tv_nsec >= 1000000000) {
            ts->tv_nsec -= 1000000000;
            ts->tv_sec++;
        }
    }
    return result;
}

/* A net for what would wait for ever, or for a limit of minutes: after a
 * while the clock is moved to its end, and the test told. No test that
 * passes comes here. */
static inline int sys_guard(int ms)
{
    return ms < 0 || ms > SYS_GUARD_MS ? SYS_GUARD_MS : ms;
}

static inline int sys_waited(int got, int ms)
{
    if (got == 0 && (ms < 0 || ms > SYS_GUARD_MS)) {
        sys.hung = true;
        if (ms > 0) sys.mono_ms += ms;
    }
    return got;
}

#if defined(__linux__) && !defined(LLMCB_NO_EPOLL)
static inline int sys_epoll_create1(int flags)
{
    if (sys_fault(SYS_epoll_create1)) return -1;
    return sys_opened(epoll_create1(flags));
}

static inline int sys_epoll_ctl(int epfd, int op, int fd,
                                struct epoll_event *ev)
{
    if (op == EPOLL_CTL_DEL) return epoll_ctl(epfd, op, fd, ev);
    return sys_fault(SYS_epoll_ctl) ? -1 : epoll_ctl(epfd, op, fd, ev);
}

static inline int sys_epoll_wait(int epfd, struct epoll_event *ev, int n,
                                 int ms)
{
    if (sys_fault(SYS_epoll_wait)) return -1;
    return sys_waited(epoll_wait(epfd, ev, n, sys_guard(ms)), ms);
}
#endif

static inline int sys_poll(struct pollfd *fds, nfds_t n, int ms)
{
    if (sys_fault(SYS_poll)) return -1;
    return sys_waited(poll(fds, n, sys_guard(ms)), ms);
}

static inline int sys_pthread_create(pthread_t *thread,
                                     const pthread_attr_t *attr,
                                     void *(*fn)(void *), void *arg)
{
    int e = sys_fault(SYS_pthread_create);

    if (!e) e = pthread_create(thread, attr, fn, arg);
    pthread_mutex_lock(&sys.lock);
    if (!e) sys.threads++;
    pthread_mutex_unlock(&sys.lock);
    return e;
}

static inline int sys_pthread_gone(int result)
{
    pthread_mutex_lock(&sys.lock);
    sys.threads--;
    pthread_mutex_unlock(&sys.lock);
    return result;
}

static inline int sys_socket(int family, int type, int protocol)
{
    if (sys_fault(SYS_socket)) return -1;
    return sys_opened(socket(family, type, protocol));
}

static inline int sys_setsockopt(int fd, int level, int name, const void *v,
                                 socklen_t len)
{
    return sys_fault(SYS_setsockopt) ? -1 : setsockopt(fd, level, name, v, len);
}

/* The connection has failed, as SO_ERROR says; or the call itself. */
static inline int sys_getsockopt(int fd, int level, int name, void *v,
                                 socklen_t *len)
{
    int e = sys_fault(SYS_getsockopt);

    if (e == ENOBUFS) return -1;
    if (!e) return getsockopt(fd, level, name, v, len);
    memcpy(v, &e, sizeof e);
    return 0;
}

static inline int sys_connect(int fd, const struct sockaddr *a, socklen_t len)
{
    int e = sys_fault(SYS_connect), result = 0;

    /* interrupted: it goes on by itself */
    if (!e || e == EINTR) result = connect(fd, a, len);
    if (!e) return result;
    errno = e;
    return -1;
}

/* Where SO_ERROR is to fail no connection is there at once, or nobody would
 * ask for it. */
static inline int sys_getpeername(int fd, struct sockaddr *a, socklen_t *len)
{
    if (sys_fault(SYS_getpeername)) return -1;
    if (!sys.at || sys.call != SYS_getsockopt) return getpeername(fd, a, len);
    errno = ENOTCONN;
    return -1;
}

static inline bool sys_breaks(int e)
{
    return e == ECONNRESET || e == EPIPE || e == ETIMEDOUT;
}

static inline ssize_t sys_send(int fd, const void *buf, size_t len, int flags)
{
    int e = sys_fault(SYS_send);

#ifdef MSG_NOSIGNAL
    if (!(flags & MSG_NOSIGNAL)) abort(); /* SIGPIPE */
#endif
    if (e == SYS_SHORT && len > 1) len = 1;
    if (e <= 0) return send(fd, buf, len, flags);
    if (sys_breaks(e)) shutdown(fd, SHUT_RDWR);
    errno = e;
    return -1;
}

/* The same call to the table, whole or in pieces. */
static inline ssize_t sys_sendmsg(int fd, const struct msghdr *m, int flags)
{
    size_t i;

    for (i = 0; i + 1 < (size_t)m->msg_iovlen; i++)
        if (m->msg_iov[i].iov_len) break;
    pthread_mutex_lock(&sys.lock);
    if (!sys.at || sys.call != SYS_send) {
        sys.calls[SYS_send]++;
        i = SIZE_MAX;
    }
    pthread_mutex_unlock(&sys.lock);
#ifdef MSG_NOSIGNAL
    if (!(flags & MSG_NOSIGNAL)) abort(); /* SIGPIPE */
#endif
    if (i == SIZE_MAX) return sendmsg(fd, m, flags);
    return sys_send(fd, m->msg_iov[i].iov_base, m->msg_iov[i].iov_len, flags);
}

static inline ssize_t sys_recv(int fd, void *buf, size_t len, int flags)
{
    int e = sys_fault(SYS_recv);

    if (e == SYS_SHORT) len = 1;
    if (e <= 0) return recv(fd, buf, len, flags);
    if (sys_breaks(e)) shutdown(fd, SHUT_RDWR);
    errno = e;
    return -1;
}

static inline int sys_getaddrinfo(const char *host, const char *port,
                                  const struct addrinfo *hints,
                                  struct addrinfo **found)
{
    struct addrinfo **end = found, h = *hints;
    char text[16];
    int e, i;

    if (hints->ai_flags & AI_NUMERICHOST) /* needs nobody's help */
        return getaddrinfo(host, port, hints, found);
    e = sys_fault(SYS_getaddrinfo);
    if (e) {
        if (e == EAI_SYSTEM) errno = EMFILE;
        return e;
    }
    if (!sys_names_of.host || strcmp(host, sys_names_of.host) != 0)
        return getaddrinfo(host, port, hints, found);
    sys_names_of.asked++;
    if (sys_names_of.wait) sys_names_of.wait();
    *found = NULL;
    h.ai_flags = AI_NUMERICHOST;
    for (i = 0; i < sys_names_of.n; i++) {
        snprintf(text, sizeof text, "%d", sys_names_of.ports[i]);
        if (getaddrinfo("127.0.0.1", text, &h, end) != 0) abort();
        end = &(*end)->ai_next;
    }
    return *found ? 0 : EAI_NONAME;
}

static inline int sys_mutex_init(pthread_mutex_t *m,
                                 const pthread_mutexattr_t *attributes)
{
    int e = sys_fault(SYS_pthread_init);

    return e ? e : pthread_mutex_init(m, attributes);
}

static inline int sys_cond_init(pthread_cond_t *c,
                                const pthread_condattr_t *attributes)
{
    int e = sys_fault(SYS_pthread_init);

    return e ? e : pthread_cond_init(c, attributes);
}

#define LLMCBI_SYS(call) sys_##call
#define pthread_mutex_init(m, a) sys_mutex_init(m, a)
#define pthread_cond_init(c, a) sys_cond_init(c, a)
#define pthread_join(thread, result) \
    sys_pthread_gone(pthread_join(thread, result))
#define pthread_detach(thread) sys_pthread_gone(pthread_detach(thread))
#define LLMCB_IMPLEMENTATION
#include "../llmcb.h"
#undef pthread_join
#undef pthread_detach
#undef pthread_mutex_init
#undef pthread_cond_init
#endif
#include "impl.h"
#endif
