/* What the drivers of tests/campaign_proof.sh have in common. Frama-C reads
 * them; nothing here is compiled or run. */
#define LLMCB_IMPLEMENTATION
#define LLMCB_NO_CURL
#define LLMCB_NO_SOCKETS
#define LLMCB_NO_EPOLL
#ifndef PROOF_STDIO
#define LLMCB_NO_STDIO
#endif
#define LLMCB_NO_AGENT
#define LLMCB_NO_KIT
#define LLMCBI_H1 1
#include <__fc_builtin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Eva's own memchr answers with a range; this one can be split. */
static void *proof_memchr(const void *s, int c, size_t n)
{
    const unsigned char *p = (const unsigned char *)s;
    size_t i = 0;

    /*@ dynamic_split i; */
    for (; i < n; i++)
        if (p[i] == (unsigned char)c) return (void *)(p + i);
    return NULL;
}
#define memchr proof_memchr

static size_t proof_strcspn(const char *s, const char *set)
{
    size_t i = 0;

    /*@ dynamic_split i; */
    for (; s[i]; i++)
        if (strchr(set, s[i])) break;
    return i;
}
#define strcspn proof_strcspn

static int proof_ctzll(unsigned long long x)
{
    /*@ assert some_bit: x != 0; */
    return Frama_C_interval(0, 63);
}
#define __builtin_ctzll proof_ctzll

#include "llmcb.h"

/* Which of the functions 0..n of a driver; ONLY: that one. */
#ifdef ONLY
#define WHICH(n) ONLY
#else
#define WHICH(n) Frama_C_interval(0, (n))
#endif

static bool any_bool(void)
{
    return Frama_C_interval(0, 1) != 0;
}

static size_t any_size(void)
{
    return Frama_C_unsigned_long_interval(0, SIZE_MAX);
}

/* Exactly n bytes of which nothing is known. */
static char *any_bytes(size_t n)
{
    char *p = (char *)malloc(n ? n : 1);

    Frama_C_make_unknown(p, n);
    return n ? p : p + 1;
}

/* Exactly n bytes and a NUL, and perhaps one before it. */
static char *any_text(size_t n)
{
    char *p = (char *)malloc(n + 1);

    Frama_C_make_unknown(p, n);
    p[n] = '\0';
    return p;
}

/* Gives exactly what is asked for, but for one time. */
static int proof_calls, proof_fail_at;
static void *proof_resize(void *user, void *ptr, size_t old, size_t size)
{
    char *p;

    (void)user;
    if (size == 0) {
        free(ptr);
        return NULL;
    }
    if (++proof_calls == proof_fail_at) return NULL;
    p = (char *)malloc(size);
    if (ptr) memcpy(p, ptr, old < size ? old : size);
    free(ptr);
    return p;
}
static const llmcb_allocator proof_alloc = { proof_resize, NULL };

/* A buffer that has grown to that size and holds that much, or none. */
static llmcbi_buf any_buf(size_t cap, size_t len)
{
    llmcbi_buf b;

    memset(&b, 0, sizeof b);
    if (!cap) return b;
    b.ptr = (char *)malloc(cap);
    b.cap = cap;
    b.len = len;
    Frama_C_make_unknown(b.ptr, len);
    b.ptr[len] = '\0';
    return b;
}

/* What has come of a character: n bytes behind one that opens it, of a kind
 * of 0..8; kind 0: nothing. n must be below its size. */
static llmcbi_carry any_carry(int kind, int n, bool high)
{
    static const unsigned char from[] = { 0,    0xC2, 0xE0, 0xE1, 0xED,
                                          0xEE, 0xF0, 0xF1, 0xF4 };
    static const unsigned char to[] = { 0,    0xDF, 0xE0, 0xEC, 0xED,
                                        0xEF, 0xF0, 0xF3, 0xF4 };
    llmcbi_carry c;

    memset(&c, 0, sizeof c);
    if (kind) {
        c.n = (uint8_t)n;
        c.bytes[0] = Frama_C_unsigned_char_interval(from[kind], to[kind]);
        Frama_C_make_unknown((char *)c.bytes + 1, (size_t)n - 1);
    }
    if (high)
        c.high = Frama_C_unsigned_short_interval(0xD800, 0xDBFF);
    return c;
}
#define CARRY_SIZE(kind) \
    ((kind) == 0 ? 1 : (kind) == 1 ? 2 : (kind) < 6 ? 3 : 4)

/* Any char but one of ASCII, in three parts: Eva holds ranges. */
static char any_but(char c, int part)
{
    return part == 0   ? Frama_C_char_interval(-128, -1)
           : part == 1 ? Frama_C_char_interval(0, (char)(c - 1))
                       : Frama_C_char_interval((char)(c + 1), 127);
}
