/* [BASE]: cleaned copies are clean, bounded UTF-8, byte for byte that of the
 * source; bytes into UTF-8 piece by piece; errors; secrets; buffers that
 * fail. Options: size, cuts, failing allocation. */
#include "fuzz.h"

/* A second opinion on UTF-8: the length of the character at s, or 0. */
static size_t char_at(const unsigned char *s, size_t n)
{
    static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
    static const uint8_t sizes[] = { 1, 1, 1, 1, 1, 1, 1, 1,
                                     0, 0, 0, 0, 2, 2, 3, 4 };
    size_t i, size = *s < 0xF8 ? sizes[*s >> 4] : 0;
    uint32_t c = *s & (size > 1 ? 0xFFu >> (size + 1) : 0xFFu);

    if (!size || size > n) return 0;
    for (i = 1; i < size; i++) {
        if (s[i] >> 6 != 2) return 0;
        c = c << 6 | (s[i] & 0x3Fu);
    }
    if (c < least[size] || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000))
        return 0;
    return size;
}

static void check_copy(llmcb_str s, size_t cap)
{
    char *out = (char *)malloc(cap);
    size_t i, n, len;

    if (!out) abort();
    memset(out, 1, cap);
    llmcbi_copy_clean(out, cap, s.ptr, s.len);
    FUZZ_CHECK(memchr(out, '\0', cap) != NULL);
    len = strlen(out);
    FUZZ_CHECK(len <= s.len && (len == s.len || len + 4 >= cap));
    FUZZ_CHECK(llmcbi_utf8_valid(out, len));
    for (i = 0; i < len; i += n) {
        const unsigned char *c = (const unsigned char *)s.ptr + i;
        n = char_at(c, s.len - i);
        if (!n) {
            n = 1;
            FUZZ_CHECK(out[i] == '?');
        } else if (n == 1 ? *c < 0x20 || *c == 0x7F
                          : *c == 0xC2 && c[1] < 0xA0) {
            FUZZ_CHECK(out[i] == ' ' && out[i + n - 1] == ' ');
        } else {
            FUZZ_CHECK(memcmp(out + i, c, n) == 0);
        }
    }
    free(out);
}

/* Bytes to UTF-8, with a replacement for each thing that is none. */
static void check_bytes(llmcb_str s)
{
    char *out = (char *)malloc(3 * s.len + 6), *at = out;
    llmcbi_carry c;
    size_t i;

    memset(&c, 0, sizeof c);
    if (!out) abort();
    for (i = 0; i < s.len; i++)
        at = llmcbi_put_byte(at, &c, (unsigned char)s.ptr[i]);
    at = llmcbi_carry_flush(at, &c);
    FUZZ_CHECK(llmcbi_utf8_valid(out, (size_t)(at - out)));
    FUZZ_CHECK(llmcbi_utf8_valid(s.ptr, s.len) ==
               llmcbi_str_equal(s, fuzz_slice(out, (size_t)(at - out))));
    free(out);
}

static void check_error(llmcb_str s, uint32_t rng)
{
    char secret[] = "sk-abcdef";
    llmcb_error e;

    llmcbi_error_set(&e, LLMCB_EAPI, NULL);
    while (s.len) {
        size_t n = fuzz_cut(&rng, s.len);
        llmcbi_error_add(&e, s.ptr, n);
        FUZZ_CHECK(strlen(e.message) < sizeof e.message);
        FUZZ_CHECK(llmcbi_utf8_valid(e.message, strlen(e.message)));
        s.ptr += n;
        s.len -= n;
    }
    llmcbi_hide(e.message, secret);
    FUZZ_CHECK(!strstr(e.message, secret));
    FUZZ_CHECK(!llmcbi_ends_with(fuzz_str(e.message), "sk-a"));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_in in = { data, data + size };
    size_t cap = 1 + fuzz_byte(&in);
    uint32_t rng = 2 + fuzz_byte(&in) * 2654435761u, cuts = rng;
    llmcb_str rest, s;
    llmcbi_buf b;

    fuzz_heap_set(fuzz_byte(&in), false);
    s = rest = fuzz_rest(&in);
    check_copy(s, cap);
    check_bytes(s);
    check_error(s, rng);
    memset(&b, 0, sizeof b);
    while (rest.len) {
        size_t n = fuzz_cut(&cuts, rest.len);
        llmcbi_buf_add(&fuzz_alloc, &b, rest.ptr, n);
        rest.ptr += n;
        rest.len -= n;
        if (b.failed) break;
        FUZZ_CHECK(b.len < b.cap && !b.ptr[b.len]);
    }
    FUZZ_CHECK(b.len <= s.len && (b.failed || b.len == s.len));
    if (b.len) FUZZ_CHECK(memcmp(b.ptr, s.ptr, b.len) == 0);
    llmcbi_buf_free(&fuzz_alloc, &b);
    FUZZ_CHECK(fuzz_heap.live == 0);
    return 0;
}
