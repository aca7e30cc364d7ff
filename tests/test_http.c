/* [HTTP]: the response parser, addresses and the rules for retries. Each
 * response is read in every possible division into reads, and ends at memory
 * that cannot be read. */
/* build: -DLLMCB_NO_AGENT -DLLMCB_NO_SOCKETS */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* mmap with MAP_ANONYMOUS, timegm */
#endif
#define LLMCB_IMPLEMENTATION
#define LLMCB_NO_CURL
#include "../llmcb.h"
#include "test.h"
#include <sys/mman.h>

/* ---- memory --------------------------------------------------------------*/

static struct {
    size_t calls, fail_at, live;
} heap;

static void *heap_resize(void *user, void *ptr, size_t old, size_t size)
{
    (void)user;
    if (size && ++heap.calls == heap.fail_at) return NULL;
    heap.live += size - old;
    if (size) return realloc(ptr, size);
    free(ptr);
    return NULL;
}

static const llmcb_allocator allocator = { heap_resize, NULL };

#define PAGES ((size_t)1 << 21)

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

/* ---- a response as one line of text --------------------------------------*/

static const llmcb_limits usual = { .header_line = 16384,
                                    .header_block = 65536,
                                    .header_fields = 128,
                                    .body = (size_t)1 << 30 };

typedef struct reading {
    llmcbi_h1 h;
    llmcbi_buf log;
    bool in_data;
    llmcbi_h1_type last;
} reading;

static void note(reading *r, const char *s, size_t n)
{
    static const llmcb_allocator a = { llmcbi_default_resize, NULL };

    llmcbi_buf_add(&a, &r->log, s, n);
}

static void note_text(reading *r, const char *s)
{
    note(r, s, strlen(s));
}

/* One read. Data that came in pieces is noted as one. */
static size_t feed(reading *r, const char *bytes, size_t n)
{
    char *read = guarded(n, n % 2 == 1), digits[24];
    const char *p = read;
    size_t taken;

    memcpy(read, bytes, n);
    do {
        llmcbi_h1 *h = &r->h;
        llmcbi_found found;
        size_t i;
        r->last = llmcbi_h1_next(&allocator, h, &p, read + n, &found);
        if (r->in_data && r->last != LLMCBI_H1_DATA &&
            r->last != LLMCBI_H1_MORE) {
            note_text(r, "> ");
            r->in_data = false;
        }
        switch (r->last) {
        case LLMCBI_H1_STATUS:
            note_text(r, llmcbi_decimal(digits, h->status));
            note_text(r, " ");
            break;
        case LLMCBI_H1_HEADER:
            note(r, found.field.name.ptr, found.field.name.len);
            note_text(r, "=");
            note(r, found.field.value.ptr, found.field.value.len);
            note_text(r, " ");
            break;
        case LLMCBI_H1_DATA:
            if (!r->in_data) note_text(r, "<");
            r->in_data = true;
            CHECK(found.n > 0);
            for (i = 0; i < found.n; i++) {
                CHECK(found.pieces[i].len > 0);
                note(r, found.pieces[i].ptr, found.pieces[i].len);
            }
            break;
        case LLMCBI_H1_MORE:
            CHECK(p == read + n);
            break;
        case LLMCBI_H1_ERROR:
        case LLMCBI_H1_END:
            break;
        }
    } while (r->last != LLMCBI_H1_MORE && r->last < LLMCBI_H1_END);
    taken = (size_t)(p - read);
    memset(read, 0xDD, n);
    return taken;
}

/* The whole response, cut at a and b and into pieces of `step`; at its end
 * the connection closes. The text is the caller's to free. */
static char *read_all(const llmcb_limits *limits, const char *s, size_t n,
                      size_t a, size_t b, size_t step)
{
    static const char *const endings[] = { "ORDERLY", "CUT", "BROKEN" };
    reading r;
    size_t at = 0;
    llmcb_code code;

    memset(&r, 0, sizeof r);
    llmcbi_h1_init(&r.h, limits);
    r.last = LLMCBI_H1_MORE;
    while (at < n && r.last == LLMCBI_H1_MORE) {
        size_t to = at < a ? a : at < b ? b : n;
        if (to - at > step) to = at + step;
        at += feed(&r, s + at, to - at);
    }
    if (r.last == LLMCBI_H1_ERROR) {
        code = llmcbi_h1_why(&r.h)->code;
        note_text(&r, llmcb_code_name(code) + 6);
        CHECK_INT(feed(&r, "x", 1), 0); /* it lasts */
        CHECK_INT(r.last, LLMCBI_H1_ERROR);
    } else {
        if (r.last == LLMCBI_H1_END) note_text(&r, "end ");
        else note_text(&r, r.in_data ? "> " : "");
        if (r.last == LLMCBI_H1_END && at < n) {
            note_text(&r, "left:");
            note(&r, s + at, n - at);
            note_text(&r, " ");
        }
        note_text(&r, endings[llmcbi_h1_eof(&r.h)]);
        code = llmcbi_h1_why(&r.h)->code;
        if (code) note_text(&r, " ");
        if (code) note_text(&r, llmcb_code_name(code) + 6);
        note_text(&r, r.h.close ? " close" : "");
    }
    llmcbi_h1_free(&allocator, &r.h);
    CHECK_INT(heap.live, 0);
    return r.log.ptr;
}

static bool check_reading(const char *got, const char *want, const char *s,
                          size_t a, size_t b)
{
    if (strcmp(got, want) == 0) return true;
    TEST_FAIL("%.60s... cut at %d, %d: \"%.200s\", not \"%.200s\"", s, (int)a,
              (int)b, got, want);
    return false;
}

/* Whole, in pieces of 1, 2, 3 ... bytes, cut at every place, and at every
 * two if it is short. */
static void check_response(const llmcb_limits *limits, const char *s,
                           size_t n, const char *want)
{
    bool ok = true;
    size_t a, b;
    char *got;

    for (a = 0; a < 8 && ok; a++) {
        got = read_all(limits, s, n, 0, 0, a ? a : n + 1);
        ok = check_reading(got, want, s, a, a);
        free(got);
    }
    for (a = 0; a <= n && ok; a += n < 2000 ? 1 : n / 50)
        for (b = n < 130 ? a : n; b <= n && ok; b++) {
            got = read_all(limits, s, n, a, b, n + 1);
            ok = check_reading(got, want, s, a, b);
            free(got);
        }
}

#define OK11 "HTTP/1.1 200 OK\r\n"
#define LENGTH(n) OK11 "Content-Length: " n "\r\n\r\n"
#define CHUNKED OK11 "Transfer-Encoding: chunked\r\n\r\n"
#define IN_CHUNKS "200 Transfer-Encoding=chunked "
#define CONTINUE "HTTP/1.1 100 Continue\r\n\r\n"

#define D(s) s, sizeof(s) - 1

static const struct {
    const char *s;
    size_t n;
    const char *want;
} responses[] = {
    /* how it ends */
    { D(LENGTH("5") "hello"), "200 Content-Length=5 <hello> end ORDERLY" },
    { D(LENGTH("0")), "200 Content-Length=0 end ORDERLY" },
    { D(LENGTH("005") "hello"), "200 Content-Length=005 <hello> end ORDERLY" },
    { D(LENGTH("9") "hello"), "200 Content-Length=9 <hello> CUT" },
    { D(LENGTH("9")), "200 Content-Length=9 CUT" },
    { D(LENGTH("2") "hello"), "200 Content-Length=2 <he> end left:llo "
                              "ORDERLY" },
    { D(OK11 "\r\nhello"), "200 <hello> ORDERLY close" },
    { D(OK11 "\r\n"), "200 ORDERLY close" },
    { D(CHUNKED "5\r\nhello\r\n0\r\n\r\n"), IN_CHUNKS "<hello> end ORDERLY" },
    { D(CHUNKED "2\r\nhe\r\n003\r\nllo\r\n0\r\n\r\n"),
      IN_CHUNKS "<hello> end ORDERLY" },
    { D(CHUNKED "A\r\n0123456789\r\na\r\n0123456789\r\n000\r\n\r\n"),
      IN_CHUNKS "<01234567890123456789> end ORDERLY" },
    { D(CHUNKED "0\r\n\r\n"), IN_CHUNKS "end ORDERLY" },
    { D(CHUNKED "0\r\n\r\nHTTP/1.1 500 x\r\n\r\n"),
      IN_CHUNKS "end left:HTTP/1.1 500 x\r\n\r\n ORDERLY" },
    { D(CHUNKED "5;a=b\r\nhello\r\n0;x\r\n\r\n"),
      IN_CHUNKS "<hello> end ORDERLY" },
    { D(CHUNKED "5\r\nhello\r\n0\r\nA: b\r\nContent-Length: 9\r\n\r\nx"),
      IN_CHUNKS "<hello> end left:x ORDERLY" },
    /* what the short way from chunk to chunk leaves to the long one */
    { D(CHUNKED "5\r\nhello\r\n00000005\r\nworld\r\n0\r\n\r\n"),
      IN_CHUNKS "<helloworld> end ORDERLY" },
    { D(CHUNKED "5\r\nhello\r\n000000005\r\nworld\r\n0\r\n\r\n"),
      IN_CHUNKS "<helloworld> end ORDERLY" },
    { D(CHUNKED "5\r\nhello\rx5\r\nworld\r\n0\r\n\r\n"),
      IN_CHUNKS "<hello> EPROTO" },
    { D(CHUNKED "5\r\nhello\r\n\r\nworld\r\n0\r\n\r\n"),
      IN_CHUNKS "<hello> EPROTO" },
    { D(CHUNKED "5\r\nhello\r\n@\r\nworld\r\n0\r\n\r\n"),
      IN_CHUNKS "<hello> EPROTO" },
    { D(CHUNKED "5\r\nhello\r\n5\rxworld\r\n0\r\n\r\n"),
      IN_CHUNKS "<hello> EPROTO" },
    /* where it is cut, in each state */
    { D(""), "BROKEN EIO" },
    { D("H"), "BROKEN EPROTO" },
    { D("HTTP/1.1 20"), "BROKEN EPROTO" },
    { D("HTTP/1.1 200 OK\r"), "BROKEN EPROTO" },
    { D(OK11), "200 BROKEN ETRUNCATED" },
    { D(OK11 "Content-Ty"), "200 BROKEN ETRUNCATED" },
    { D(OK11 "A: b\r\n"), "200 A=b BROKEN ETRUNCATED" },
    { D(OK11 "A: b\r\n\r"), "200 A=b BROKEN ETRUNCATED" },
    { D(CHUNKED), IN_CHUNKS "CUT" },
    { D(CHUNKED "5"), IN_CHUNKS "CUT" },
    { D(CHUNKED "5;ext"), IN_CHUNKS "CUT" },
    { D(CHUNKED "5\r"), IN_CHUNKS "CUT" },
    { D(CHUNKED "5\r\n"), IN_CHUNKS "CUT" },
    { D(CHUNKED "5\r\nhel"), IN_CHUNKS "<hel> CUT" },
    { D(CHUNKED "5\r\nhello"), IN_CHUNKS "<hello> CUT" },
    { D(CHUNKED "5\r\nhello\r"), IN_CHUNKS "<hello> CUT" },
    { D(CHUNKED "5\r\nhello\r\n"), IN_CHUNKS "<hello> CUT" },
    { D(CHUNKED "5\r\nhello\r\n0\r\n"), IN_CHUNKS "<hello> CUT" },
    { D(CHUNKED "5\r\nhello\r\n0\r\nA: b\r\n"), IN_CHUNKS "<hello> CUT" },
    /* the status line */
    { D("HTTP/1.1 200\r\n\r\n"), "200 ORDERLY close" },
    { D("HTTP/1.1 200 \r\n\r\n"), "200 ORDERLY close" },
    { D("HTTP/1.1 404 Not \xC3\xA9 Found\r\nContent-Length: 0\r\n\r\n"),
      "404 Content-Length=0 end ORDERLY" },
    { D("HTTP/1.1 599 x\r\n\r\n"), "599 ORDERLY close" },
    { D("SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"), "EPROTO" },
    { D("SSH-2.0-OpenSSH_9.2p1"), "EPROTO" },
    { D("<html>old</html>"), "EPROTO" },
    { D("\x16\x03\x01\x02"), "EPROTO" },
    { D("\r\n" OK11 "\r\n"), "EPROTO" },
    { D("\n" OK11 "\r\n"), "EPROTO" },
    { D(" " OK11 "\r\n"), "EPROTO" },
    { D("HTTP/2 200\r\n\r\n"), "EPROTO" },
    { D("HTTP/2.0 200 OK\r\n\r\n"), "EPROTO" },
    { D("http/1.1 200 OK\r\n\r\n"), "EPROTO" },
    { D("HTTP/1.x 200 OK\r\n\r\n"), "EPROTO" },
    { D("HTTP/1.12 200 OK\r\n\r\n"), "EPROTO" },
    { D("HTTP/1./ 200 OK\r\n\r\n"), "EPROTO" },
    { D("HTTP/1. 200 OK\r\n\r\n"), "EPROTO" },
    { D("HTTP/1.1\t200 OK\r\n\r\n"), "EPROTO" },
    { D("HTTP/1.1 20\r\n\r\n"), "EPROTO" },
    { D("HTTP/1.1 2000 OK\r\n\r\n"), "EPROTO" },
    { D("HTTP/1.1 2x0 OK\r\n\r\n"), "EPROTO" },
    { D("HTTP/1.1 -20 OK\r\n\r\n"), "EPROTO" },
    { D("HTTP/1.1 099 OK\r\n\r\n"), "EPROTO" },
    { D("HTTP/1.1 600 OK\r\n\r\n"), "EPROTO" },
    { D("HTTP/1.1 101 Switching Protocols\r\n\r\n"), "EPROTO" },
    { D("HTTP/1.1 200 OK\n\r\n"), "EPROTO" },
    { D("HTTP/1.1 200 O\0K\r\n\r\n"), "EPROTO" },
    { D("HTTP/1.1 200 O\rK\r\n\r\n"), "EPROTO" },
    { D("HTTP\r\n\r\n"), "EPROTO" },
    /* header fields */
    { D(OK11 "A:b\r\nB: \t c d \t\r\nC:\r\n\r\n"),
      "200 A=b B=c d C= ORDERLY close" },
    { D(OK11 "!#$%&'*+-.^_`|~09aZ: x\r\n\r\n"),
      "200 !#$%&'*+-.^_`|~09aZ=x ORDERLY close" },
    { D(OK11 "A: x:y\tz\xFF\r\n\r\n"), "200 A=x:y\tz\xFF ORDERLY close" },
    { D(OK11 "no colon\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "nocolon\r\n\r\n"), "200 EPROTO" },
    { D(OK11 ": no name\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A : b\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A\t: b\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A: b\r\n folded\r\n\r\n"), "200 A=b EPROTO" },
    { D(OK11 "A: b\r\n\tfolded\r\n\r\n"), "200 A=b EPROTO" },
    { D(OK11 " A: b\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A: b\0c\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A\0: b\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A: b\rc\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A: b\r\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A: b\x7F\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A: b\x1F\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A: b\x1B[2J\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A\xFF: b\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A(: b\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "A: b\n\r\n"), "200 EPROTO" },
    { D(OK11 "A: b\r\n\n"), "200 A=b EPROTO" },
    { D(OK11 "\n"), "200 EPROTO" },
    /* the length of the body */
    { D(LENGTH("-1")), "200 EPROTO" },
    { D(LENGTH("+1")), "200 EPROTO" },
    { D(LENGTH("99999999999999999999")), "200 EPROTO" },
    { D(LENGTH("18446744073709551617")), "200 EPROTO" },
    { D(LENGTH("12abc")), "200 EPROTO" },
    { D(LENGTH("1 2")), "200 EPROTO" },
    { D(LENGTH("0x5")), "200 EPROTO" },
    { D(LENGTH("")), "200 EPROTO" },
    { D(LENGTH("5, 5")), "200 EPROTO" },
    { D(LENGTH("1.0")), "200 EPROTO" },
    { D(OK11 "Content-Length: 5\r\ncontent-LENGTH: 5\r\n\r\nhello"),
      "200 Content-Length=5 content-LENGTH=5 <hello> end ORDERLY" },
    { D(OK11 "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
      "200 Content-Length=5 EPROTO" },
    { D(OK11 "Content-Length: 0\r\nContent-Length: 6\r\n\r\nhello"),
      "200 Content-Length=0 EPROTO" },
    { D(OK11 "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"),
      "200 Content-Length=5 Transfer-Encoding=chunked EPROTO" },
    { D(OK11 "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n"),
      "200 Transfer-Encoding=chunked Content-Length=0 EPROTO" },
    { D(OK11 "transfer-encoding: CHUNKED\r\n\r\n0\r\n\r\n"),
      "200 transfer-encoding=CHUNKED end ORDERLY" },
    { D(OK11 "Transfer-Encoding: gzip\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "Transfer-Encoding: gzip, chunked\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "Transfer-Encoding: identity\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "Transfer-Encoding: xchunked\r\n\r\n"), "200 EPROTO" },
    { D(OK11 "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
      IN_CHUNKS "EPROTO" },
    { D(OK11 "Transfer-Encoding:\r\n\r\n"), "200 EPROTO" },
    /* chunks */
    { D(CHUNKED "zz\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "-5\r\nhello\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "+5\r\nhello\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "0x5\r\nhello\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED " 5\r\nhello\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "5 \r\nhello\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "\r\nhello\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED ";a\r\nhello\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "ffffffffffffffff\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "fffffffffffffffff\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "10000000000000000\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "8000000000000000\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "7fffffffffffffff\r\n"), IN_CHUNKS "ELIMIT" },
    { D(CHUNKED "40000001\r\n"), IN_CHUNKS "ELIMIT" },
    { D(CHUNKED "2\r\nab\r\n3fffffff\r\n"), IN_CHUNKS "<ab> ELIMIT" },
    { D(CHUNKED "5\nhello\n0\n\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "5\r\nhello\n0\r\n\r\n"), IN_CHUNKS "<hello> EPROTO" },
    { D(CHUNKED "5\r\nhello\r0\r\n\r\n"), IN_CHUNKS "<hello> EPROTO" },
    { D(CHUNKED "5\r\nhelloX\r\n"), IN_CHUNKS "<hello> EPROTO" },
    { D(CHUNKED "5\rXhello\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "5;a\nhello\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "5;a\rb\r\nhello\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "5;a\0b\r\nhello\r\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "0\r\n\n"), IN_CHUNKS "EPROTO" },
    { D(CHUNKED "0\n\r\n"), IN_CHUNKS "EPROTO" },
    /* interim responses */
    { D(CONTINUE LENGTH("0")), "200 Content-Length=0 end ORDERLY" },
    { D("HTTP/1.1 103 Early Hints\r\nContent-Length: 9\r\nTransfer-Encoding: "
        "gzip\r\nConnection: close\r\n\r\n" LENGTH("0")),
      "200 Content-Length=0 end ORDERLY" },
    { D("HTTP/1.1 102 x\r\nbad\r\n\r\n" LENGTH("0")), "EPROTO" },
    { D("HTTP/1.0 100 x\r\n\r\n" LENGTH("0")),
      "200 Content-Length=0 end ORDERLY" },
    { D(CONTINUE "junk"), "EPROTO" },
    /* responses that have no body, whatever their head says */
    { D("HTTP/1.1 204 No\r\n\r\nx"), "204 end left:x ORDERLY" },
    { D("HTTP/1.1 204 No\r\nContent-Length: 1\r\n\r\nx"),
      "204 Content-Length=1 end left:x ORDERLY" },
    { D("HTTP/1.1 304 No\r\nTransfer-Encoding: chunked\r\n\r\n"),
      "304 Transfer-Encoding=chunked end ORDERLY" },
    /* whether the connection is of further use */
    { D("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"),
      "200 Content-Length=0 end ORDERLY close" },
    { D("HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: Keep-Alive"
        "\r\n\r\n"),
      "200 Content-Length=0 Connection=Keep-Alive end ORDERLY" },
    { D("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\n"),
      "200 Connection=keep-alive ORDERLY close" },
    { D(OK11 "Connection: CLOSE\r\nContent-Length: 0\r\n\r\n"),
      "200 Connection=CLOSE Content-Length=0 end ORDERLY close" },
    { D(OK11 "Connection: a ,close, b\r\nContent-Length: 0\r\n\r\n"),
      "200 Connection=a ,close, b Content-Length=0 end ORDERLY close" },
    { D(OK11 "Connection: close \t,b\r\nContent-Length: 0\r\n\r\n"),
      "200 Connection=close \t,b Content-Length=0 end ORDERLY close" },
    { D(OK11 "Connection: closed, enclose\r\nContent-Length: 0\r\n\r\n"),
      "200 Connection=closed, enclose Content-Length=0 end ORDERLY" },
    /* RFC 9112, 9.3: close decides, wherever it stands */
    { D(OK11 "Connection: close, keep-alive\r\nContent-Length: 0\r\n\r\n"),
      "200 Connection=close, keep-alive Content-Length=0 end ORDERLY close" },
    { D(OK11 "Connection: close\r\nConnection: keep-alive\r\n"
             "Content-Length: 0\r\n\r\n"),
      "200 Connection=close Connection=keep-alive Content-Length=0 end "
      "ORDERLY close" },
    { D(OK11 "Connection: a,\tclose\r\nContent-Length: 0\r\n\r\n"),
      "200 Connection=a,\tclose Content-Length=0 end ORDERLY close" },
    { D(OK11 "Connection: a,\tclose\t,b\r\nContent-Length: 0\r\n\r\n"),
      "200 Connection=a,\tclose\t,b Content-Length=0 end ORDERLY close" },
    { D(OK11 "Connection: a,,\t, close\r\nContent-Length: 0\r\n\r\n"),
      "200 Connection=a,,\t, close Content-Length=0 end ORDERLY close" },
    { D(OK11 "Connection:\r\nContent-Length: 0\r\n\r\n"),
      "200 Connection= Content-Length=0 end ORDERLY" },
};

TEST(responses_are_read_the_same_in_any_pieces)
{
    for (size_t i = 0; i < sizeof responses / sizeof *responses; i++)
        check_response(&usual, responses[i].s, responses[i].n,
                       responses[i].want);
}

/* ---- limits --------------------------------------------------------------*/

static char *text; /* of responses that are made */
static size_t text_len;

static void put(const char *s, size_t times)
{
    size_t n = strlen(s);

    text = realloc(text, text_len + n * times + 1);
    for (; times > 0; times--, text_len += n) memcpy(text + text_len, s, n + 1);
}

/* What begins so must end so, or not: the middle is not compared. */
static void check_end(const llmcb_limits *limits, const char *want)
{
    static const size_t steps[] = { 1, 2, 7, 1000, 16384, SIZE_MAX };

    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        char *got;
        if (steps[i] < 7 && text_len > 300000) continue;
        got = read_all(limits, text, text_len, 0, 0, steps[i]);
        if (strlen(got) < strlen(want) ||
            strcmp(got + strlen(got) - strlen(want), want) != 0)
            TEST_FAIL("in pieces of %d: \"...%s\", not \"...%s\"",
                      (int)steps[i],
                      got + (strlen(got) > 60 ? strlen(got) - 60 : 0), want);
        free(got);
    }
    free(text);
    text = NULL;
    text_len = 0;
}

TEST(a_head_of_the_limit_passes_and_one_more_byte_does_not)
{
    for (int more = -1; more <= 1; more++) {
        const char *want = more > 0 ? "ELIMIT" : "ORDERLY close";
        llmcb_limits l = usual;
        /* one line, with its end */
        l.header_line = 100;
        put(OK11 "A: ", 1);
        put("x", (size_t)(100 - 5 + more));
        put("\r\n\r\n", 1);
        check_end(&l, want);
        put("HTTP/1.1 200 ", 1);
        put("x", (size_t)(100 - 15 + more));
        put("\r\n\r\n", 1);
        check_end(&l, want);
        /* all lines, with the last blank one: 17 + 10 * 10 + 7 + 2 */
        l = usual;
        l.header_block = (size_t)(126 - more);
        put(OK11, 1);
        put("abc: def\r\n", 10);
        put("a: bc\r\n\r\n", 1);
        check_end(&l, want);
        /* the number of fields */
        l = usual;
        l.header_fields = (size_t)(10 - more);
        put(OK11, 1);
        put("a:b\r\n", 10);
        put("\r\n", 1);
        check_end(&l, want);
        /* the length said in advance, chunks, and a body without either */
        l = usual;
        l.body = (size_t)(20 - more);
        put(LENGTH("20"), 1);
        put("x", 20);
        check_end(&l, more > 0 ? "=20 ELIMIT" : "end ORDERLY");
        put(CHUNKED, 1);
        put("a\r\n0123456789\r\n", 2);
        put("0\r\n\r\n", 1);
        check_end(&l, more > 0 ? "<0123456789> ELIMIT" : "end ORDERLY");
    }
}

/* As much as was asked for arrives, however it was cut. */
TEST(a_body_up_to_the_close_arrives_up_to_the_limit)
{
    llmcb_limits l = usual;

    l.body = 10;
    check_response(&l, D(OK11 "\r\n0123456789"),
                   "200 <0123456789> ORDERLY close");
    check_response(&l, D(OK11 "\r\n0123456789a"), "200 <0123456789> ELIMIT");
    check_response(&l, D(OK11 "\r\n0123456789abcdef"),
                   "200 <0123456789> ELIMIT");
}

/* A chunk that does not fit is refused by its size, before any of it. */
TEST(a_chunk_beyond_the_limit_is_refused_by_its_size)
{
    llmcb_limits l = usual;

    l.body = 10;
    check_response(&l, D(CHUNKED "5\r\nhello\r\n5\r\nworld\r\n0\r\n\r\n"),
                   IN_CHUNKS "<helloworld> end ORDERLY");
    check_response(&l, D(CHUNKED "5\r\nhello\r\n6\r\nworlds\r\n0\r\n\r\n"),
                   IN_CHUNKS "<hello> ELIMIT");
}

TEST(huge_heads_are_refused)
{
    put(OK11 "A: ", 1); /* one line of 90 KB, with and without an end */
    put("x", 90000);
    check_end(&usual, "ELIMIT");
    put(OK11 "A: ", 1);
    put("x", 200000);
    put("\r\n\r\n", 1);
    check_end(&usual, "ELIMIT");
    put(OK11, 1);
    put("A: b\r\n", 40000);
    check_end(&usual, "ELIMIT");
    put(OK11, 1); /* few, but large */
    put("A: 0123456789012345678901234567890123456789", 1);
    put("0123456789012345678901234567890123456789\r\nA: ", 1000);
    check_end(&usual, "ELIMIT");
    put(CONTINUE, 8);
    put(LENGTH("0"), 1);
    check_end(&usual, "end ORDERLY");
    put(CONTINUE, 9);
    put(LENGTH("0"), 1);
    check_end(&usual, "ELIMIT");
    put(CONTINUE, 2000);
    check_end(&usual, "ELIMIT");
    /* fields of interim responses count as well */
    put("HTTP/1.1 103 x\r\na:b\r\na:b\r\n\r\n", 1);
    put(OK11, 1);
    put("a:b\r\n", 126);
    put("\r\n", 1);
    check_end(&usual, "ORDERLY close");
    put("HTTP/1.1 103 x\r\na:b\r\na:b\r\n\r\n", 1);
    put(OK11, 1);
    put("a:b\r\n", 127);
    put("\r\n", 1);
    check_end(&usual, "ELIMIT");
}

/* Whatever is no HTTP is known by its first bytes, not by its length. */
TEST(a_page_without_a_head_is_no_http_however_it_comes)
{
    put("<html>", 15000);
    check_end(&usual, "EPROTO");
}

TEST(chunk_framing_has_its_limits)
{
    for (int more = 0; more < 2; more++) {
        put(CHUNKED "1;", 1);
        put("x", 256 + (size_t)more);
        put("\r\na\r\n0\r\n\r\n", 1);
        check_end(&usual, more ? "ELIMIT" : "<a> end ORDERLY");
        put(CHUNKED "0\r\nA: ", 1); /* 8192 with the blank line */
        put("x", 8192 - 7 + (size_t)more);
        put("\r\n\r\n", 1);
        check_end(&usual, more ? "ELIMIT" : "end ORDERLY");
        put(CHUNKED "0\r\n", 1);
        put("A: 0123456789\r\n", 546 + (size_t)more);
        put("\r\n", 1);
        check_end(&usual, more ? "ELIMIT" : "end ORDERLY");
    }
    for (int i = 0; i < 2; i++) { /* each extension for itself */
        put(i ? "\r\na\r\n1;" : CHUNKED "1;", 1);
        put("x", 200);
    }
    put("\r\nb\r\n0\r\n\r\n", 1);
    check_end(&usual, "<ab> end ORDERLY");
    put(CHUNKED "1;", 1);
    put("x", 1000000);
    check_end(&usual, "ELIMIT");
    /* 100 KiB of framing are free, then it may be three times the data */
    put(CHUNKED, 1);
    put("1\r\nx\r\n", 20000);
    put("0\r\n\r\n", 1);
    check_end(&usual, "end ORDERLY");
    put(CHUNKED, 1);
    put("1\r\nx\r\n", 21000);
    check_end(&usual, "ELIMIT");
    put(CHUNKED, 1);
    put("4\r\nabcd\r\n", 100000);
    put("0\r\n\r\n", 1);
    check_end(&usual, "end ORDERLY");
}

TEST(the_parser_says_when_memory_is_out)
{
    static const char s[] = OK11 "Some-Header: with a value that is so long "
                                 "that the line must grow to hold it all\r\n"
                                 "Content-Length: 5\r\n\r\nhello";
    size_t i = 0;

    heap.fail_at = 0;
    for (bool failed = true; failed;) {
        char *got;
        heap.calls = 0;
        heap.fail_at = ++i;
        got = read_all(&usual, s, sizeof s - 1, 0, 0, 1);
        failed = heap.calls >= i;
        CHECK((strstr(got, "ENOMEM") != NULL) == failed);
        free(got);
    }
    heap.fail_at = 0;
    CHECK(i > 2);
    heap.calls = 0; /* and takes none for what comes whole */
    free(read_all(&usual, s, sizeof s - 1, 0, 0, sizeof s));
    CHECK_INT(heap.calls, 0);
}

/* ---- addresses -----------------------------------------------------------*/

static bool is(llmcb_str s, const char *want)
{
    return llmcbi_str_is(s, want);
}

TEST(addresses_are_taken_apart)
{
    static const struct {
        const char *url, *host, *authority, *target;
        int port;
        bool tls, local;
    } rows[] = {
        { "http://a", "a", "a", "/", 80, false, false },
        { "https://a", "a", "a", "/", 443, true, false },
        { "http://a/", "a", "a", "/", 80, false, false },
        { "https://a.b:8443/v1/x", "a.b", "a.b:8443", "/v1/x", 8443, true,
          false },
        { "http://a/x?y=1&z=/?", "a", "a", "/x?y=1&z=/?", 80, false, false },
        { "http://a:65535/", "a", "a:65535", "/", 65535, false, false },
        { "http://a:1/@:x", "a", "a:1", "/@:x", 1, false, false },
        { "http://a:0080/", "a", "a:0080", "/", 80, false, false },
        { "http://[::1]", "::1", "[::1]", "/", 80, false, true },
        { "https://[fe80::1]:99/x", "fe80::1", "[fe80::1]:99", "/x", 99, true,
          false },
        { "http://[::2]/", "::2", "[::2]", "/", 80, false, false },
        { "http://localhost:1/", "localhost", "localhost:1", "/", 1, false,
          true },
        { "http://LocalHost/", "LocalHost", "LocalHost", "/", 80, false,
          true },
        { "http://localhost.evil/", "localhost.evil", "localhost.evil", "/",
          80, false, false },
        { "http://xlocalhost/", "xlocalhost", "xlocalhost", "/", 80, false,
          false },
        { "http://127.0.0.1/", "127.0.0.1", "127.0.0.1", "/", 80, false,
          true },
        { "http://127.1.2.3/", "127.1.2.3", "127.1.2.3", "/", 80, false,
          true },
        { "http://127.evil.example/", "127.evil.example", "127.evil.example",
          "/", 80, false, false },
        { "http://127.0.0.1.nip.io/", "127.0.0.1.nip.io", "127.0.0.1.nip.io",
          "/", 80, false, false },
        { "http://128.0.0.1/", "128.0.0.1", "128.0.0.1", "/", 80, false,
          false },
        { "http://1270.0.0.1/", "1270.0.0.1", "1270.0.0.1", "/", 80, false,
          false },
        { "http://127.0-0.1/", "127.0-0.1", "127.0-0.1", "/", 80, false,
          false },
        { "http://127/", "127", "127", "/", 80, false, false },
        { "http://0.0.0.0/", "0.0.0.0", "0.0.0.0", "/", 80, false, false },
        { "unix:/run/s:/v1/x", "localhost", "localhost", "/v1/x", 0, false,
          true },
        { "unix:s:/a:b?c", "localhost", "localhost", "/a:b?c", 0, false,
          true },
    };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        size_t n = strlen(rows[i].url) + 1;
        const char *s = memcpy(guarded(n, true), rows[i].url, n);
        llmcbi_url u;
        const char *why;
        memset(&u, 0xA5, sizeof u);
        why = llmcbi_url_parse(&u, s);
        if (why || !is(u.host, rows[i].host) ||
            !is(u.authority, rows[i].authority) ||
            !is(u.target, rows[i].target) || u.port != rows[i].port ||
            u.tls != rows[i].tls || llmcbi_url_is_local(&u) != rows[i].local)
            TEST_FAIL("%s: %s", s, why ? why : "read wrongly");
        else if (!strncmp(s, "unix:", 5) &&
                 !is(u.unix_path, s[5] == 's' ? "s" : "/run/s"))
            TEST_FAIL("%s: the wrong path", s);
    }
}

TEST(bad_addresses_are_refused)
{
    static const char *const rows[] = {
        "", "a", "/", "ftp://a/", "file:///etc/passwd", "HTTP://a/",
        "http:/a", "http:a", "httpx://a/", "https:/a/", "//a/", "http://",
        "https://", "http:///x", "http://:80/", "http://?x", "http://#",
        "http://a?x", "http://a#x", "http://a/#x", "http://a/x#", "http://a:",
        "http://a:/", "http://a:0/", "http://a:65536/", "http://a:99999999999",
        "http://a:4294967376/", "http://a:-1/", "http://a:+1/", "http://a:x/",
        "http://a:80x/", "http://a:8 0/", "http://a:80:81/", "http://u@a/",
        "http://u:p@a/", "https://u:p@a:1/", "http://@a/", "http://a:80@b/",
        "http://[::1/", "http://[]/", "http://[::1]x/", "http://[::1]80/",
        "http://[::1]:/", "http://[::1]:x/", "http://::1/", "http://a b/",
        "http://a/x y", " http://a/", "http://a/ ", "http://a\r\nX: y/",
        "http://a/\r\nX: y", "http://a/\n", "http://a/\t", "http://a\x7F/",
        "http://a/\x01", "unix:", "unix::", "unix::/x", "unix:/s:x",
        "unix:/s:x/y", "unix:/s p:/x", "unix:/s\n:/x", "UNIX:/s:/x",
    };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        size_t n = strlen(rows[i]) + 1;
        llmcbi_url u;
        if (!llmcbi_url_parse(&u, memcpy(guarded(n, true), rows[i], n)))
            TEST_FAIL("accepted: %s", rows[i]);
    }
}

/* ---- retries -------------------------------------------------------------*/

static int64_t wish(const char *s, int64_t now_ms)
{
    size_t n = strlen(s);

    return llmcbi_retry_after(
        llmcbi_slice(memcpy(guarded(n, true), s, n), n), now_ms);
}

TEST(retry_after_is_seconds_or_a_date)
{
    static const struct {
        const char *s;
        int64_t want; /* at 2023-11-14 22:13:20.5; -1: none */
    } rows[] = {
        { "0", 0 },
        { "1", 1000 },
        { "001", 1000 },
        { "120", 120000 },
        { "1.5", 1500 },
        { "0.25", 250 },
        { "0.001", 1 },
        { "2.0009", 2000 },
        { "1771404540", 1771404540000 },
        { "", -1 },
        { "-5", -1 },
        { "+5", -1 },
        { " 5", -1 },
        { "5 ", -1 },
        { "5s", -1 },
        { "5.5s", -1 },
        { "5.5 ", -1 },
        { ".5", -1 },
        { "NaN", -1 },
        { "inf", -1 },
        { "1e3", -1 },
        { "1e400", -1 },
        { "1.2.3", -1 },
        { "0x10", -1 },
        { "soon", -1 },
        { "Tue, 14 Nov 2023 22:13:21 GMT", 1000 }, /* 500 ms, rounded up */
        { "Tue, 14 Nov 2023 22:13:22 GMT", 2000 },
        { "Tue, 14 Nov 2023 22:13:20 GMT", 0 }, /* over */
        { "Tue, 14 Nov 2023 22:13:19 GMT", 0 },
        { "Mon, 01 Jan 1990 00:00:00 GMT", 0 },
        { "Thu, 01 Jan 1970 00:00:00 GMT", 0 },
        { "Wed, 15 Nov 2023 22:13:20 GMT", 86400000 },
        { "Tue, 14 Nov 2023 22:13:21 UTC", -1 },
        { "Tue, 14 Nov 2023 22:13:21 gmt", -1 },
        { "Tue, 14 Nov 2023 22:13:21", -1 },
        { "Tue, 14 Nov 2023 22:13:21 GMT ", -1 },
        { "Tue, 14 Nox 2023 22:13:21 GMT", -1 },
        { "Tue, 00 Nov 2023 22:13:21 GMT", -1 },
        { "Tue, 32 Nov 2023 22:13:21 GMT", -1 },
        { "Tue, 1x Nov 2023 22:13:21 GMT", -1 },
        { "Tue, 14 Nov 1969 22:13:21 GMT", -1 },
        { "Tue, 14 Nov 20x3 22:13:21 GMT", -1 },
        { "Tue, 14 Nov 2023 x2:13:21 GMT", -1 },
        { "Tue, 14 Nov 2023 22:-3:21 GMT", -1 },
        { "Tue, 14 Nov 2023 22:13:2  GMT", -1 },
        { "Tuesday, 14-Nov-23 22:13:21 GMT", -1 }, /* obsolete forms */
        { "Tue Nov 14 22:13:21 2023", -1 },
    };
    char *digits = malloc(4097);

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int64_t got = wish(rows[i].s, 1700000000500);
        if (got != rows[i].want)
            TEST_FAIL("%s: %lld", rows[i].s, (long long)got);
    }
    memset(digits, '9', 4096); /* and 4 KB of digits: too long to wait for */
    digits[4096] = '\0';
    CHECK(wish(digits, 0) > LLMCBI_RETRY_CAP);
    memset(digits, '0', 4096);
    CHECK_INT(wish(digits, 0), 0);
    free(digits);
    CHECK_INT(llmcbi_parse_seconds(llmcb_text("250"), 1), 250);
    CHECK_INT(llmcbi_parse_seconds(llmcb_text("250.9"), 1), 250);
    CHECK_INT(llmcbi_parse_seconds(llmcb_text("x"), 1), LLMCBI_NO_WISH);
}

TEST(dates_are_those_of_timegm)
{
    static const char days[] = "SunMonTueWedThuFriSat";
    static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";

    /* every day of 1970 to 2110, with 2000 and 2100, at changing times */
    for (int64_t t = 0; t < (int64_t)86400 * 365 * 141; t += 86400 - 7) {
        time_t at = (time_t)t;
        struct tm tm;
        char s[64];
        if ((int64_t)at != t) break; /* a time_t of 32 bits */
        gmtime_r(&at, &tm);
        CHECK(timegm(&tm) == at);
        sprintf(s, "%.3s, %02d %.3s %04d %02d:%02d:%02d GMT",
                days + 3 * tm.tm_wday, tm.tm_mday, months + 3 * tm.tm_mon,
                tm.tm_year + 1900, tm.tm_hour, tm.tm_min, tm.tm_sec);
        if (llmcbi_parse_date(llmcb_text(s)) != t) TEST_FAIL("%s", s);
    }
}

TEST(the_backoff_doubles_and_varies_downward)
{
    static const int64_t most[] = { 500, 500, 1000, 2000, 4000, 8000, 8000 };
    llmcbi_random r = { { 1, 2, 3, 4 } };

    for (int failed = 0; failed < 60; failed++) {
        int64_t top = most[failed < 6 ? failed : 6], low = top, high = 0;
        for (int i = 0; i < 400; i++) {
            int64_t ms = llmcbi_backoff(&r, failed);
            if (ms < low) low = ms;
            if (ms > high) high = ms;
        }
        CHECK(low > top * 3 / 4 && high <= top);
        CHECK(low < top * 78 / 100 && high > top * 97 / 100);
    }
    CHECK(llmcbi_backoff(&r, INT_MAX) <= 8000);
}

TEST(statuses_that_may_be_tried_again)
{
    for (int status = 100; status < 600; status++)
        CHECK(llmcbi_status_retryable(status) ==
              (status == 408 || status == 409 || status == 429 ||
               status >= 500));
}

int main(int argc, char **argv)
{
    return test_main(argc, argv);
}
