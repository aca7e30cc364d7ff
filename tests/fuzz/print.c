/* llmcb_str_print: nothing that a terminal would act on comes out of UTF-8;
 * all else comes out as it is; characters printed one by one give the same. */
#include "fuzz.h"

static char *printed(llmcb_str s, bool one_by_one, size_t *len)
{
    char *out = NULL;
    FILE *f = open_memstream(&out, len);

    if (!f) abort();
    while (s.len) {
        size_t n = one_by_one ? llmcbi_utf8_at(s.ptr, s.len) : s.len;
        char *exact = fuzz_copy(s.ptr, n);
        llmcb_str_print(fuzz_slice(exact, n), f);
        free(exact);
        s.ptr += n;
        s.len -= n;
    }
    fclose(f);
    return out;
}

/* The code point at *s, which is moved behind it. */
static uint32_t next_char(const unsigned char **s)
{
    uint32_t c = *(*s)++;
    int n = c < 0x80 ? 0 : c < 0xE0 ? 1 : c < 0xF0 ? 2 : 3;

    if (n) c &= 0x3Fu >> n;
    while (n--)
        c = c << 6 | (*(*s)++ & 0x3Fu);
    return c;
}

static bool acts(uint32_t c)
{
    return (c < 0x20 && c != '\n' && c != '\t') || (c >= 0x7F && c < 0xA0) ||
           (c >= 0x202A && c <= 0x202E) || (c >= 0x2066 && c <= 0x2069);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    llmcb_str s = fuzz_slice((const char *)data, size);
    size_t len, n;
    char *out = printed(s, false, &len), *one;
    const unsigned char *p = data, *end = data + size;
    const char *o = out;

    FUZZ_CHECK(len >= size);
    if (!llmcbi_utf8_valid(s.ptr, s.len)) {
        free(out);
        return 0;
    }
    one = printed(s, true, &n);
    FUZZ_CHECK(n == len && memcmp(one, out, len) == 0);
    while (p < end) {
        const unsigned char *from = p;
        uint32_t c = next_char(&p);
        char escape[16];
        if (acts(c)) {
            n = (size_t)sprintf(escape, c < 0x80 ? "\\x%02x" : "\\u%04x",
                                (unsigned)c);
            FUZZ_CHECK(strncmp(o, escape, n) == 0);
        } else {
            n = (size_t)(p - from);
            FUZZ_CHECK(memcmp(o, from, n) == 0);
        }
        o += n;
    }
    FUZZ_CHECK(o == out + len);
    free(out);
    free(one);
    return 0;
}
