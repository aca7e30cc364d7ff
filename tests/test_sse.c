/* [SSE]: the framer against a second decoder, which works on the whole
 * stream, for every way in which the stream may be cut into reads. */
/* build: -DLLMCB_NO_AGENT -DLLMCB_NO_KIT -DLLMCB_NO_SOCKETS */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* mmap with MAP_ANONYMOUS */
#endif
#include <string.h>
#include <sys/mman.h>

/* Searching is most of the work: it is counted, and so is linear or not
 * whatever the speed of the machine. */
static size_t looked_at;

static void *counted_memchr(const void *s, int c, size_t n)
{
    void *at = n ? memchr(s, c, n) : NULL;

    looked_at += at ? (size_t)((char *)at - (const char *)s) + 1 : n;
    return at;
}

#undef memchr
#define memchr counted_memchr
#define LLMCB_IMPLEMENTATION
#define LLMCB_NO_CURL
#include "../llmcb.h"
#include "test.h"

static uint64_t seed; /* of the random test; SEED in the environment */

/* ---- the heap, which can fail --------------------------------------------*/

static struct {
    size_t calls, fail_at, live;
    bool for_ever;
} heap;

static void *heap_resize(void *user, void *ptr, size_t old, size_t size)
{
    (void)user;
    if (size) {
        heap.calls++;
        if (heap.calls == heap.fail_at ||
            (heap.for_ever && heap.fail_at && heap.calls > heap.fail_at))
            return NULL;
    }
    heap.live += size - old;
    if (size) return realloc(ptr, size);
    free(ptr);
    return NULL;
}

static const llmcb_allocator allocator = { heap_resize, NULL };

/* ---- logs of events ------------------------------------------------------*/

/* Events one behind the other: 'd' or 'e' for event: error, the length, the
 * data; then how it ended. */
typedef struct log {
    char *ptr;
    size_t len, cap, events;
} log;

static void log_add(log *l, const void *bytes, size_t n)
{
    if (l->len + n > l->cap) {
        l->cap = 2 * (l->len + n) + 64;
        l->ptr = realloc(l->ptr, l->cap);
    }
    if (n) memcpy(l->ptr + l->len, bytes, n);
    l->len += n;
}

static void log_event(log *l, bool is_error, const char *data, size_t n)
{
    log_add(l, is_error ? "e" : "d", 1);
    log_add(l, &n, sizeof n);
    log_add(l, data, n);
    l->events++;
}

static bool log_equal(const log *a, const log *b)
{
    return a->len == b->len && (!a->len || !memcmp(a->ptr, b->ptr, a->len));
}

static void log_free(log *l)
{
    free(l->ptr);
    memset(l, 0, sizeof *l);
}

/* ---- the second decoder --------------------------------------------------*/

/* Step by step as the HTML standard has it, but that an event without data
 * is not told of, since providers send blank ones to keep a connection
 * alive. No limit. */
static void reference(log *l, const char *s, size_t n)
{
    char *data = malloc(n + 1);
    size_t i = 0, len = 0;
    bool any = false, is_error = false;

    if (n >= 3 && memcmp(s, "\xEF\xBB\xBF", 3) == 0) i = 3;
    while (i < n) {
        size_t eol = i, name, value;
        while (eol < n && s[eol] != '\n' && s[eol] != '\r') eol++;
        if (eol == n) break; /* a line without an end is none */
        for (name = i; name < eol && s[name] != ':';) name++;
        value = name < eol ? name + 1 : name;
        if (value < eol && s[value] == ' ') value++;
        if (eol == i) {
            if (len) log_event(l, is_error, data, len);
            len = 0;
            any = is_error = false;
        } else if (name - i == 4 && memcmp(s + i, "data", 4) == 0) {
            if (any) data[len++] = '\n';
            memcpy(data + len, s + value, eol - value);
            len += eol - value;
            any = true;
        } else if (name - i == 5 && memcmp(s + i, "event", 5) == 0) {
            is_error = eol - value == 5 && !memcmp(s + value, "error", 5);
        }
        i = eol + 1;
        if (s[eol] == '\r' && i < n && s[i] == '\n') i++;
    }
    free(data);
}

/* ---- the decoder in question ---------------------------------------------*/

#define PAGES ((size_t)1 << 16)

/* Where the byte behind n bytes, or the one before them, is a trap. */
static char *guarded(size_t n, bool at_end)
{
    static char *base;

    if (!base) {
        base = mmap(NULL, 3 * PAGES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
                    -1, 0);
        if (base == MAP_FAILED || n > PAGES ||
            mprotect(base + PAGES, PAGES, PROT_READ | PROT_WRITE) != 0)
            abort();
    }
    return base + (at_end ? 2 * PAGES - n : PAGES);
}

/* One read, which is gone afterwards. */
static llmcbi_sse_status feed(llmcbi_sse *s, log *l, const char *bytes,
                              size_t n)
{
    char *read = guarded(n, n % 2 == 1);
    const char *p = read;
    llmcbi_sse_status status;
    llmcb_str event;

    memcpy(read, bytes, n);
    while ((status = llmcbi_sse_next(&allocator, s, &p, read + n, &event)) ==
           LLMCBI_SSE_EVENT)
        log_event(l, s->is_error, event.ptr, event.len);
    if (status == LLMCBI_SSE_MORE) CHECK(p == read + n);
    memset(read, 0xDD, n);
    return status;
}

/* Cut at a and b, then into pieces of `step` bytes. */
static llmcbi_sse_status run(log *l, const char *bytes, size_t n, size_t a,
                             size_t b, size_t step, size_t limit)
{
    llmcbi_sse_status status = LLMCBI_SSE_MORE;
    llmcbi_sse s;
    size_t at = 0;

    memset(&s, 0, sizeof s);
    s.limit = limit;
    while (at < n && status == LLMCBI_SSE_MORE) {
        size_t to = at < a ? a : at < b ? b : n;
        if (to - at > step) to = at + step;
        status = feed(&s, l, bytes + at, to - at);
        at = to;
    }
    llmcbi_sse_free(&allocator, &s);
    return status;
}

static void fail(const char *why, const char *s, size_t n, size_t a, size_t b)
{
    char text[300], *p = text;

    for (size_t i = 0; i < n && p < text + 200; i++) {
        unsigned char c = (unsigned char)s[i];
        p += c >= ' ' && c < 0x7F && c != '\\' ? sprintf(p, "%c", c)
                                               : sprintf(p, "\\x%02X", c);
    }
    *p = '\0';
    TEST_FAIL("seed %llu: %s, cut at %d and %d of %d: %s",
              (unsigned long long)seed, why, (int)a, (int)b, (int)n, text);
}

static bool check_cut(const char *s, size_t n, size_t a, size_t b,
                      size_t step, const log *want)
{
    log got = { NULL, 0, 0, 0 };
    bool ok = run(&got, s, n, a, b, step, SIZE_MAX / 4) == LLMCBI_SSE_MORE &&
              log_equal(&got, want);

    if (!ok) fail("another log", s, n, a, b);
    log_free(&got);
    return ok;
}

/* Whole, byte by byte, cut at every place and, if short, at every two. */
static void check_stream(const char *s, size_t n)
{
    log want = { NULL, 0, 0, 0 };
    size_t a, b;
    bool ok = true; /* one failure of a stream is enough */

    reference(&want, s, n);
    for (a = 1; a < 12 && ok; a++) ok = check_cut(s, n, 0, 0, a, &want);
    for (a = 0; a <= n && ok; a++)
        for (b = n <= 400 ? a : n; b <= n && ok; b++)
            ok = check_cut(s, n, a, b, n + 1, &want);
    log_free(&want);
    CHECK_INT(heap.live, 0);
}

/* ---- streams -------------------------------------------------------------*/

#define D(s) { s, sizeof(s) - 1 }

/* With LF; the other ends of lines are made of it. */
static const struct {
    const char *text;
    size_t len;
} streams[] = {
    D("data: a\n\ndata: bc\n\n"),
    D("data:x\n\ndata: x\n\ndata:  x\n\ndata\n\ndata:\n\ndata: \n\n"),
    D("data: {\"a\":\ndata: 1}\n\ndata\ndata\n\ndata:\ndata:x\ndata:\n\n"),
    D("data: 1\ndata: 22\ndata: 333\ndata: 4444\n\ndata: 5\n\n"),
    D(": comment\n\n:\n\n:data: no\ndata: yes\n: ping\n\n: ping\n\n"),
    D("id: 1\n\nid: 2\ndata: a\n\n: ping\n\ndata: b\n\n"),
    D("event: error\ndata: bad\n\ndata: good\n\n"),
    D("event: error\ndata: bad\ndata: more\n\ndata: good\n\ndata: x\n\n"),
    D("event: error\n\ndata: good\n\nevent: error\nevent: x\ndata: y\n\n"),
    D("event:error\ndata:a\n\nevent: error \ndata: b\n\nevent\ndata: c\n\n"),
    D("data: a\nevent: error\n\nevent: errors\ndata: b\n\n"),
    D("foo: bar\nDATA: x\n data: x\ndata : x\ndatax: y\ndat: z\n\ndata: a\n\n"),
    D("retry: 1000000000\nid: a\0b\nid\nfoo\n:\n\ndata: a\n\n"),
    D("data: a\0b\xFF\xC3\n\ndata: \0\n\n\0\n\ndata\0: x\n\n"),
    D("\n\n\n\ndata: a\n\n\n\n\n"),
    D("data: a\n\ndata: cut"),
    D("data: a\n\ndata: cut\n"),
    D("data: a:b: c\n\ndata:a:\n\ndata::\n\n: :\n\n"),
    D("\xEF\xBB\xBF" "data: a\n\n\xEF\xBB\xBF" "data: b\n\ndata: c\n\n"),
    D("\xEF\xBB\xBF\xEF\xBB\xBF" "data: a\n\ndata: b\n\n"),
    D("\xEF\xBB" "data: a\n\ndata: b\n\n"),
    D("\xEF" "data: a\n\ndata: \xEF\xBB\xBF\n\n"),
    D("\xEF\xBB\xBF\n\n\xEF\xBB\xBF\n\ndata: b\n\n"),
    D("\xEF\xBB\n\ndata: b\n\n"),
    D("\xEF\xBB\xBF"),
    D("\xEF"),
    D("data: [DONE]\n\ndata: after\n\n"),
    D("data: {\"choices\":[{\"delta\":{\"content\":\"Why\"}}]}\n\n"
      ": keep-alive\n\n"
      "data: {\"choices\":[{\"delta\":{\"content\":\"\xF0\x9F\x98\x80\"}}]}\n\n"
      "data: [DONE]\n\n"),
    D(""),
};

TEST(every_cut_of_every_stream_gives_the_same_events)
{
    static const char *const ends[] = { "\n", "\r", "\r\n", "\n\r\r\n" };

    for (size_t i = 0; i < sizeof streams / sizeof *streams; i++)
        for (int e = 0; e < 4; e++) {
            char s[800];
            size_t n = 0, line = 0;
            for (size_t k = 0; k < streams[i].len; k++) {
                if (streams[i].text[k] != '\n') {
                    s[n++] = streams[i].text[k];
                } else if (e < 3) {
                    n += (size_t)sprintf(s + n, "%s", ends[e]);
                } else if (line++ % 3 < 2) { /* in turns */
                    s[n++] = ends[3][line % 3];
                } else {
                    n += (size_t)sprintf(s + n, "\r\n");
                }
            }
            check_stream(s, n);
        }
}

TEST(a_long_stream_cut_once)
{
    char s[6000];
    size_t n = 0;

    for (int i = 0; n < 5000; i++)
        n += (size_t)sprintf(s + n,
                             "data: {\"id\":\"chatcmpl-%d\",\"choices\":[{"
                             "\"index\":0,\"delta\":{\"content\":\" w%d\"}}]}"
                             "%s",
                             i, i, i % 3 == 2 ? "\r\n\r\n" : "\n\n");
    check_stream(s, n);
}

/* The end of a line is looked for in stretches of 2,048 bytes. */
TEST(lines_longer_than_a_stretch)
{
    static const char *const ends[] = { "\n", "\r", "\r\n" };
    static char s[7000];

    for (int e = 0; e < 3; e++)
        for (size_t len = 2030; len < 6200; len += len % 2048 < 20 ? 1 : 509) {
            log want = { NULL, 0, 0, 0 };
            size_t n = (size_t)sprintf(s, "data:");
            memset(s + n, 'x', len);
            n += len;
            n += (size_t)sprintf(s + n, "%s%sdata: b%s%sdata: c", ends[e],
                                 ends[e], ends[e], ends[e]);
            reference(&want, s, n);
            CHECK_INT(want.events, 2);
            check_cut(s, n, 0, 0, n, &want);
            check_cut(s, n, 3, len, n, &want);
            log_free(&want);
        }
}

TEST(random_streams)
{
    static const char *const bits[] = {
        "data", "data:", "data: ", ":", " ", "\n", "\n", "\n\n", "\r", "\r\n",
        "event: error", "event:", "id: 1", "x", "\xEF\xBB\xBF", "\xEF", "long "
    };
    const char *given = getenv("SEED");
    llmcbi_random r = { { 0, 2, 3, 4 } };

    seed = given ? strtoull(given, NULL, 10) : (uint64_t)time(NULL);
    r.s[0] = seed;
    for (int i = 0; i < 20; i++) llmcbi_random_next(&r);
    for (int i = 0; i < 4000; i++) {
        char s[256];
        size_t n = 0, k = llmcbi_random_next(&r) % 24;
        log want = { NULL, 0, 0, 0 };
        bool ok = true;
        while (k-- > 0)
            n += (size_t)sprintf(s + n, "%s",
                                 bits[llmcbi_random_next(&r) % 17]);
        reference(&want, s, n);
        for (k = 1; k < 4 && ok; k++) ok = check_cut(s, n, 0, 0, k, &want);
        for (k = 0; k < 20 && n && ok; k++)
            ok = check_cut(s, n, llmcbi_random_next(&r) % n,
                           llmcbi_random_next(&r) % n, n, &want);
        log_free(&want);
    }
    seed = 0;
}

/* ---- what the second decoder does not say --------------------------------*/

TEST(events_are_what_the_standard_says)
{
    static const struct {
        const char *s, *want; /* events parted by '|', '!' before an error */
    } rows[] = {
        { "data:x\n\n", "x|" },
        { "data: x\n\n", "x|" },
        { "data:  x\n\n", " x|" },
        { "data\n\n", "" },
        { "data:\n\n", "" },
        { "data:a\ndata:\ndata: b\n\n", "a\n\nb|" },
        { "data\ndata\n\n", "\n|" },
        { "event: error\ndata: a\n\ndata: b\n\n", "!a|b|" },
        { ": a\n\ndata: b\r\r", "b|" },
        { "data: a\r\n\r\ndata: b\n\r", "a|b|" },
        { "\xEF\xBB\xBF" "data: a\n\n", "a|" },
        { "data: a\n", "" },
        { "id: 1\n\n: ping\n\n", "" },
    };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char got[64] = "";
        const char *p = rows[i].s, *end = p + strlen(p);
        llmcb_str event;
        llmcbi_sse s;
        memset(&s, 0, sizeof s);
        s.limit = 100;
        while (llmcbi_sse_next(&allocator, &s, &p, end, &event) ==
               LLMCBI_SSE_EVENT)
            sprintf(got + strlen(got), "%s%.*s|", s.is_error ? "!" : "",
                    (int)event.len, event.ptr);
        CHECK_STR(got, rows[i].want);
        llmcbi_sse_free(&allocator, &s);
    }
}

/* The end of an event is known with its CR, not with what follows. */
TEST(a_cr_at_the_end_of_a_read_ends_the_event)
{
    static const char s[] = "data: a\r\r";

    for (size_t cut = 0; cut < sizeof s; cut++) {
        log l = { NULL, 0, 0, 0 };
        CHECK_INT(run(&l, s, sizeof s - 1, cut, cut, 99, 99),
                  LLMCBI_SSE_MORE);
        CHECK_INT(l.events, 1);
        log_free(&l);
    }
}

/* ---- limits --------------------------------------------------------------*/

static void check_limit(const char *s, size_t n, size_t limit, bool fits)
{
    log all = { NULL, 0, 0, 0 };

    reference(&all, s, n);
    for (size_t step = 1; step <= n; step += step < 8 ? 1 : n / 4)
        for (size_t a = 0; a <= (step < n ? 0 : n); a++) {
            log l = { NULL, 0, 0, 0 };
            llmcbi_sse_status status = run(&l, s, n, a, a, step, limit);
            if (status != (fits ? LLMCBI_SSE_MORE : LLMCBI_SSE_LIMIT))
                fail("wrong status", s, n, a, step);
            if (l.events != (fits ? all.events : 1))
                fail("wrong number of events", s, n, a, step);
            log_free(&l);
        }
    log_free(&all);
}

TEST(a_line_or_event_of_the_limit_passes_and_one_more_byte_does_not)
{
    for (int more = -1; more <= 1; more++) {
        enum { LIMIT = 40 };
        char s[200];
        int n = LIMIT + more;
        /* one line, with data or without */
        size_t len = (size_t)sprintf(s, "data: a\n\ndata: %0*d\n\n", n - 6, 1);
        check_limit(s, len, LIMIT, more <= 0);
        len = (size_t)sprintf(s, "data: a\n\n:%0*d\n\n", n - 1, 1);
        check_limit(s, len, LIMIT, more <= 0);
        /* one without an end */
        len = (size_t)sprintf(s, "data: a\n\n%0*d", n, 1);
        check_limit(s, len, LIMIT, more <= 0);
        /* lines that are joined, each of them short */
        len = (size_t)sprintf(s, "data: a\n\ndata: %020d\ndata:%0*d\n\n", 1,
                              n - 21, 1);
        check_limit(s, len, LIMIT, more <= 0);
        len = (size_t)sprintf(s, "data: a\r\rdata\rdata: %020d\rdata:%0*d\r\r",
                              1, n - 22, 1);
        check_limit(s, len, LIMIT, more <= 0);
    }
}

/* ---- memory --------------------------------------------------------------*/

/* The allocator fails at each call, once or from then on. */
static void fail_each(const log *want, const char *s, size_t n, size_t step)
{
    for (int for_ever = 0; for_ever < 2; for_ever++)
        for (size_t i = 1;; i++) {
            log got = { NULL, 0, 0, 0 };
            llmcbi_sse_status status;
            heap.calls = 0;
            heap.fail_at = i;
            heap.for_ever = for_ever;
            status = run(&got, s, n, 0, 0, step, 1000);
            CHECK(got.len <= want->len &&
                  (!got.len || !memcmp(got.ptr, want->ptr, got.len)));
            if (heap.calls < i) CHECK(log_equal(&got, want));
            CHECK_INT(status, heap.calls < i ? LLMCBI_SSE_MORE
                                             : LLMCBI_SSE_NOMEM);
            CHECK_INT(heap.live, 0);
            log_free(&got);
            if (heap.calls < i) break;
        }
}

TEST(a_failing_allocator_is_told_and_loses_no_earlier_event)
{
    static const char s[] = "\xEF\xBB\xBF: c\ndata: one\n\n"
                            "data: two\ndata: lines of it, the second of "
                            "which is so long that the buffer must grow\n\n"
                            "event: error\ndata: three\n\n"
                            "data: four\ndata: has\ndata: more\n\n";
    size_t n = sizeof s - 1;
    log want = { NULL, 0, 0, 0 };

    reference(&want, s, n);
    for (size_t step = 1; step <= n; step += step < 4 ? 1 : 17)
        fail_each(&want, s, n, step);
    log_free(&want);
    for (size_t cut = 1; cut < n; cut++) { /* nothing may follow */
        heap.fail_at = 0;
        reference(&want, s, cut);
        fail_each(&want, s, cut, cut);
        log_free(&want);
    }
    heap.fail_at = 0;
}

/* ---- work ----------------------------------------------------------------*/

/* Events that lie whole in a read need no memory at all. */
TEST(whole_events_are_shown_in_place)
{
    static const char s[] = "data: a\n\n: c\n\ndata: b\r\n\r\nevent: x\n\n";
    const char *p = s, *end = s + sizeof s - 1;
    llmcb_str event;
    llmcbi_sse f;
    int events = 0;

    memset(&f, 0, sizeof f);
    f.limit = 100;
    f.bom = 3;
    heap.calls = 0;
    while (llmcbi_sse_next(&allocator, &f, &p, end, &event) ==
           LLMCBI_SSE_EVENT) {
        CHECK(event.ptr > s && event.ptr < end);
        events++;
    }
    CHECK_INT(events, 2);
    CHECK_INT(heap.calls, 0);
    llmcbi_sse_free(&allocator, &f);
}

/* Feeds n bytes or a few more; how many have been looked at. */
static size_t work(const char *head, const char *unit, const char *tail,
                   size_t step, size_t n)
{
    static char s[(1 << 16) + 64];
    size_t len = (size_t)sprintf(s, "%s", head);
    llmcbi_sse f;

    while (len < n) len += (size_t)sprintf(s + len, "%s", unit);
    len += (size_t)sprintf(s + len, "%s", tail);
    memset(&f, 0, sizeof f);
    f.limit = 2 * n;
    heap.calls = looked_at = 0;
    for (size_t at = 0; at < len; at += step) {
        const char *p = s + at;
        const char *end = s + (len - at < step ? len : at + step);
        llmcb_str event;
        while (llmcbi_sse_next(&allocator, &f, &p, end, &event) ==
               LLMCBI_SSE_EVENT)
            continue;
    }
    llmcbi_sse_free(&allocator, &f);
    CHECK_INT(heap.live, 0);
    return looked_at;
}

TEST(the_work_grows_with_the_bytes_and_not_faster)
{
    static const struct {
        const char *head, *unit, *tail;
        size_t step; /* 0: all in one read */
    } rows[] = {
        { "data: ", "x", "\n\n", 1 }, /* one big line, byte by byte */
        { "data: ", "x", "\r\r", 1 },
        { "", "x", "", 1 },
        { "", "data: x\n", "\n", 1 }, /* one big event */
        { "", "data: x\n", "\n", 0 },
        { "", "data: x\r", "\r", 0 },
        { "", "data: x\n\n", "", 0 }, /* many small ones */
        { "", "data: x\r\n\r\n", "", 0 },
        { "", "data: x\r\r", "", 0 },
        { "", "data: x\r\r", "\n", 0 },
        { "", "\n", "", 0 },
        { "", "\r", "", 0 },
        { "", ":\r", "", 0 },
    };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        size_t once, twice, n = (size_t)1 << 15;
        size_t step = rows[i].step ? rows[i].step : 4 * n;
        once = work(rows[i].head, rows[i].unit, rows[i].tail, step, n);
        twice = work(rows[i].head, rows[i].unit, rows[i].tail, step, 2 * n);
        if (twice > once * 22 / 10)
            TEST_FAIL("row %d: looked at %d bytes, at %d of twice as many",
                      (int)i, (int)once, (int)twice);
        if (heap.calls > 30)
            TEST_FAIL("row %d: %d allocations", (int)i, (int)heap.calls);
    }
}

int main(int argc, char **argv)
{
    return test_main(argc, argv);
}
