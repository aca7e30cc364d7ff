/* What the clients of the benchmark share: the hash of a text, the clock,
 * the marks and the RESULT line. Everything counts from bench_begin() on.
 *
 * The marks cut the ends off: when a fifth of all tokens has come, and again
 * at nine tenths, the process's CPU time is noted, so that what a token costs
 * can be told from what it costs to set up and end streams. */
#ifndef BENCH_H
#define BENCH_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* A client that is stuck must not hold up the run. */
#define BENCH_LIFE_S 300

typedef struct bench_mark {
    uint64_t at, tokens;
    double cpu, wall;
} bench_mark;

static struct {
    uint64_t streams, tokens, bytes, checksum, errors;
    uint64_t wire, allocs, reads, waits;
    uint64_t peak_bytes; /* of the library's memory, by its own requests */
    double cpu0, wall0;
    bench_mark marks[3]; /* the last is never reached */
    unsigned n_marks;
    double first_wall; /* a part of the run that a client times itself */
} bench;

static inline double bench_wall(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* User and system time of all threads. */
static inline double bench_cpu(void)
{
    struct rusage u;

    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static inline void bench_begin(uint64_t streams, uint64_t tokens)
{
    struct rlimit r;
    uint64_t all = streams * tokens;

    if (getrlimit(RLIMIT_NOFILE, &r) == 0) {
        r.rlim_cur = r.rlim_max;
        setrlimit(RLIMIT_NOFILE, &r);
    }
    alarm(BENCH_LIFE_S);
    bench.streams = streams;
    bench.marks[0].at = all / 5;
    bench.marks[1].at = all - all / 10;
    bench.marks[2].at = UINT64_MAX;
    bench.cpu0 = bench_cpu();
    bench.wall0 = bench_wall();
}

/* Tells how many tokens have come in all; one compare most of the time. */
/* Apart, so that a handler which is called for each token saves nothing of it
 * on the stack. */
__attribute__((noinline)) static void bench_take_mark(uint64_t tokens)
{
    bench_mark *m = &bench.marks[bench.n_marks++];

    m->tokens = tokens;
    m->cpu = bench_cpu();
    m->wall = bench_wall();
}

static inline void bench_progress(uint64_t tokens)
{
    if (tokens >= bench.marks[bench.n_marks].at) bench_take_mark(tokens);
}

static inline uint32_t bench_hash_word(uint32_t h, uint32_t w)
{
    return (((h << 13) | (h >> 19)) ^ w) * 0x9E3779B1u;
}

/* The 32-bit hash of a stream's text; the checksum is the sum of them. */
static inline uint32_t bench_hash(const char *text, size_t len)
{
    const unsigned char *p = (const unsigned char *)text;
    uint32_t h = 0x811c9dc5u ^ (uint32_t)len, w = 0;
    size_t i;

    for (; len >= 4; p += 4, len -= 4)
        h = bench_hash_word(h, (uint32_t)p[0] | (uint32_t)p[1] << 8 |
                                   (uint32_t)p[2] << 16 |
                                   (uint32_t)p[3] << 24);
    for (i = 0; i < len; i++) w |= (uint32_t)p[i] << 8 * i;
    return bench_hash_word(h, w);
}

static inline void bench_add_text(const char *text, size_t len)
{
    bench.bytes += len;
    bench.checksum += bench_hash(text, len);
}

/* The high-water mark of the resident set. ru_maxrss would still hold that
 * of the shell that started this program. */
static inline unsigned long bench_peak_kib(void)
{
    unsigned long kib = 0;
    char line[128];
    FILE *f = fopen("/proc/self/status", "r");
    struct rusage u;

    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "VmHWM: %lu", &kib) == 1) break;
    if (f) fclose(f);
    if (kib) return kib;
    getrusage(RUSAGE_SELF, &u);
    return (unsigned long)u.ru_maxrss;
}

/* The line that all clients print, and one more with what not all have. */
static inline int bench_end(const char *client)
{
    double wall = bench_wall() - bench.wall0, cpu = bench_cpu() - bench.cpu0;
    const bench_mark *a = &bench.marks[0], *b = &bench.marks[1];
    unsigned steady = bench.n_marks == 2;

    printf("RESULT client=%s streams=%llu tokens=%llu bytes=%llu "
           "checksum=%llu wall_s=%.6f cpu_s=%.6f peak_rss_kib=%lu "
           "errors=%llu wire=%llu allocs=%llu\n",
           client, (unsigned long long)bench.streams,
           (unsigned long long)bench.tokens, (unsigned long long)bench.bytes,
           (unsigned long long)bench.checksum, wall, cpu, bench_peak_kib(),
           (unsigned long long)bench.errors, (unsigned long long)bench.wire,
           (unsigned long long)bench.allocs);
    printf("MORE reads=%llu waits=%llu peak_bytes=%llu steady_tokens=%llu "
           "steady_cpu_s=%.6f steady_wall_s=%.6f part_wall_s=%.6f\n",
           (unsigned long long)bench.reads, (unsigned long long)bench.waits,
           (unsigned long long)bench.peak_bytes,
           (unsigned long long)(steady ? b->tokens - a->tokens : 0),
           steady ? b->cpu - a->cpu : 0, steady ? b->wall - a->wall : 0,
           bench.first_wall);
    return bench.errors ? 1 : 0;
}

#endif
