/* The least that a client must do: reads, goes from chunk to chunk, finds
 * `"content":"` in each event by a scan for just that, removes the escapes,
 * calls one handler and keeps the text. It believes all that the server says
 * and would fail with any other; nothing that is true of every server is left
 * out of the header's work for its sake. */
#include "ref.h"

static void count(const char *text, size_t len)
{
    (void)text;
    if (len) bench_progress(++bench.tokens);
}

/* Volatile, so that the call stays one. */
static void (*volatile handler)(const char *text, size_t len) = count;

static unsigned hex(char c)
{
    return c <= '9' ? (unsigned)(c - '0') : (unsigned)((c | 32) - 'a' + 10);
}

static uint32_t hex4(const char *p)
{
    return hex(p[0]) << 12 | hex(p[1]) << 8 | hex(p[2]) << 4 | hex(p[3]);
}

static char *put_utf8(char *o, uint32_t u)
{
    if (u < 0x80) {
        *o++ = (char)u;
        return o;
    }
    if (u < 0x800) {
        *o++ = (char)(0xC0 | u >> 6);
    } else if (u < 0x10000) {
        *o++ = (char)(0xE0 | u >> 12);
        *o++ = (char)(0x80 | (u >> 6 & 63));
    } else {
        *o++ = (char)(0xF0 | u >> 18);
        *o++ = (char)(0x80 | (u >> 12 & 63));
        *o++ = (char)(0x80 | (u >> 6 & 63));
    }
    *o++ = (char)(0x80 | (u & 63));
    return o;
}

/* Removes the escapes of a string up to its quote; returns the end. */
static char *unescape(char *o, const char *p)
{
    for (; *p != '"'; p++) {
        uint32_t u;
        if (*p != '\\') {
            *o++ = *p;
            continue;
        }
        switch (*++p) {
        case 'n': *o++ = '\n'; break;
        case 't': *o++ = '\t'; break;
        case 'r': *o++ = '\r'; break;
        case 'b': *o++ = '\b'; break;
        case 'f': *o++ = '\f'; break;
        case 'u':
            u = hex4(p + 1);
            p += 4;
            if (u >= 0xD800 && u < 0xDC00 && p[1] == '\\') {
                u = 0x10000 + ((u - 0xD800) << 10) + hex4(p + 3) - 0xDC00;
                p += 6;
            }
            o = put_utf8(o, u);
            break;
        default: *o++ = *p; break;
        }
    }
    return o;
}

/* One chunk, which is one event. Returns whether it was the last. */
static int event(ref_stream *s, const char *p, size_t len)
{
    static const char key[] = "\"content\":\"";
    const size_t k = sizeof key - 1;
    const char *end = p + len, *at;

    if (len > 11 && memcmp(p, "data: [DONE", 11) == 0) return 0;
    at = p + (len < 200 ? len : 200); /* what stands before it is known */
    for (;; at++) {
        at = (const char *)memchr(at, '"', (size_t)(end - at));
        if (!at || (size_t)(end - at) < k) return 0;
        if (memcmp(at, key, k) == 0) break;
    }
    at += k;
    if (s->cap - s->len < len) {
        size_t cap = s->cap ? 2 * (size_t)s->cap : 512;
        char *text = (char *)realloc(s->text, cap);
        if (!text) return -1;
        bench.allocs++;
        s->text = text;
        s->cap = (uint32_t)cap;
    }
    end = unescape(s->text + s->len, at);
    len = (size_t)(end - s->text) - s->len;
    handler(s->text + s->len, len);
    s->len += (uint32_t)len;
    return 0;
}

/* Chunk by chunk; what is left of the last one is kept for the next read. */
static int ref_take(ref_stream *s, char *bytes, size_t len)
{
    char *p = bytes, *end = bytes + len;
    int done = 0;

    if (s->rest_len) {
        p -= s->rest_len;
        memcpy(p, s->rest, s->rest_len);
        s->rest_len = 0;
        free(s->rest);
        s->rest = NULL;
    }
    while (p < end && !done) {
        size_t size = 0;
        char *q = p;
        if (!s->body) {
            for (; end - q >= 4 && memcmp(q, "\r\n\r\n", 4) != 0; q++) continue;
            if (end - q < 4) break;
            p = q + 4;
            s->body = 1;
            continue;
        }
        for (; q < end && *q != '\r'; q++) size = size << 4 | hex(*q);
        q += 2;
        if (end - q < (ptrdiff_t)size + 2) break;
        if (size == 0) done = 1;
        else if (event(s, q, size) < 0) return -1;
        p = q + size + 2;
    }
    if (done || p >= end) return done;
    if (end - p > REF_ROOM) return -1;
    s->rest_len = (uint32_t)(end - p);
    s->rest = (char *)malloc(s->rest_len);
    bench.allocs++;
    if (!s->rest) return -1;
    memcpy(s->rest, p, s->rest_len);
    return 0;
}

static void ref_done(ref_stream *s)
{
    bench_add_text(s->text ? s->text : "", s->len);
    free(s->text);
}

int main(int argc, char **argv)
{
    return ref_main(argc, argv, "scan");
}
