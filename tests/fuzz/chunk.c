/* [HTTP]: a chunked body, the head of which is given, reads the same in one
 * piece, in pieces and byte by byte, and is what a second, strict decoder
 * makes of it. Options: limit, cuts. */
#include "fuzz.h"

static const char chunk_head[] =
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

static int hex_digit(char c)
{
    static const char all[] = "0123456789abcdef0123456789ABCDEF";
    const char *at = c ? strchr(all, c) : NULL;

    return at ? (int)((at - all) % 16) : -1;
}

/* The number of bytes of a chunked body, which is added to *out; 0: bad. */
static size_t dechunk(llmcbi_buf *out, const char *s, size_t n)
{
    size_t at = 0;

    for (;;) {
        unsigned long long size = 0;
        size_t digits = 0, eol;
        for (; at < n && hex_digit(s[at]) >= 0; at++, digits++)
            size = size << 4 | (unsigned)hex_digit(s[at]);
        if (!digits || digits > 16 || at == n || size > INT64_MAX) return 0;
        if (s[at] != '\r' && s[at] != ';') return 0;
        for (eol = at; eol < n && s[eol] != '\r'; eol++)
            if (!s[eol] || s[eol] == '\n') return 0;
        if (n - eol < 2 || s[eol + 1] != '\n') return 0;
        at = eol + 2;
        if (!size) break;
        if (n - at < 2 || size > n - at - 2) return 0;
        fuzz_note(out, s + at, (size_t)size);
        at += (size_t)size;
        if (s[at] != '\r' || s[at + 1] != '\n') return 0;
        at += 2;
    }
    for (;;) { /* the trailer */
        const char *lf = (const char *)memchr(s + at, '\n', n - at);
        size_t line = lf ? (size_t)(lf - s) - at : 0;
        if (!line || s[at + line - 1] != '\r' ||
            memchr(s + at, '\r', line - 1) || memchr(s + at, '\0', line))
            return 0;
        at += line + 1;
        if (line == 1) return at;
    }
}

/* Adds the body to *out and its length to *taken. */
static llmcbi_h1_type read_chunks(llmcbi_buf *out, size_t *taken, llmcb_str s,
                               llmcbi_h1 *h, uint32_t rng)
{
    const char *p = chunk_head;
    llmcbi_h1_type type;
    llmcbi_found found;
    size_t i;

    *taken = 0;
    do
        type = llmcbi_h1_next(&fuzz_alloc, h, &p,
                              chunk_head + sizeof chunk_head - 1, &found);
    while (type == LLMCBI_H1_STATUS || type == LLMCBI_H1_HEADER);
    while (type == LLMCBI_H1_MORE && *taken < s.len) {
        size_t n = fuzz_cut(&rng, s.len - *taken);
        char *piece = fuzz_copy(s.ptr + *taken, n);
        p = piece;
        while ((type = llmcbi_h1_next(&fuzz_alloc, h, &p, piece + n, &found)) ==
               LLMCBI_H1_DATA)
            for (i = 0; i < found.n; i++)
                fuzz_note(out, found.pieces[i].ptr, found.pieces[i].len);
        *taken += (size_t)(p - piece);
        free(piece);
    }
    llmcbi_h1_free(&fuzz_alloc, h);
    FUZZ_CHECK(fuzz_heap.live == 0);
    return type;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_in in = { data, data + size };
    unsigned most = fuzz_byte(&in), cuts = fuzz_byte(&in);
    llmcb_str s = fuzz_rest(&in);
    llmcb_limits limits;
    llmcbi_h1_type type[3];
    llmcb_code code[3];
    llmcbi_buf out[4];
    llmcbi_h1 h[3];
    size_t taken[3], n;
    int i;

    memset(&limits, 0, sizeof limits);
    memset(out, 0, sizeof out);
    llmcbi_limits_default(&limits);
    if (most) limits.body = most;
    n = dechunk(&out[3], s.ptr, s.len);
    for (i = 0; i < 3; i++) {
        fuzz_heap_set(0, false);
        llmcbi_h1_init(&h[i], &limits);
        type[i] = read_chunks(&out[i], &taken[i], s, &h[i],
                           i < 2 ? (uint32_t)i : 2 + cuts * 2654435761u);
        code[i] = llmcbi_h1_why(&h[i])->code;
        FUZZ_CHECK(type[i] == type[0] && code[i] == code[0]);
        FUZZ_CHECK(fuzz_same(&out[i], &out[0]));
        FUZZ_CHECK(out[i].len <= limits.body);
        if (type[i] == LLMCBI_H1_END)
            FUZZ_CHECK(taken[i] == n && fuzz_same(&out[i], &out[3]));
        else
            FUZZ_CHECK(!n || code[i] == LLMCB_ELIMIT);
        FUZZ_CHECK(llmcbi_h1_eof(&h[i]) ==
                   (type[i] == LLMCBI_H1_END ? LLMCB_ORDERLY : LLMCB_CUT));
    }
    for (i = 0; i < 4; i++)
        fuzz_drop(&out[i]);
    return 0;
}
