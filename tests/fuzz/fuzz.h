/* What all fuzz targets share: options out of the input, a heap that counts
 * and fails, input cut into pieces that are gone after use, logs.
 *
 * A target is a function from bytes to nothing that stops the program when
 * an invariant does not hold. With -DFUZZ_ENGINE a fuzzer's own main calls
 * it; else the main below runs each file that it is given. replay.c is all of
 * them in one program. */
#ifndef FUZZ_H
#define FUZZ_H

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* timegm, open_memstream */
#endif
#define LLMCB_IMPLEMENTATION
#define LLMCB_NO_CURL
#define LLMCB_ASSERT(x) ((x) ? (void)0 : abort())
#include "../../llmcb.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define FUZZ_CHECK(cond)                                                       \
    do {                                                                       \
        if (!(cond)) {                                                         \
            fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #cond); \
            abort();                                                           \
        }                                                                      \
    } while (0)

/* ---- options: the first bytes of the input ------------------------------ */

typedef struct fuzz_in {
    const uint8_t *p, *end;
} fuzz_in;

static inline unsigned fuzz_byte(fuzz_in *in)
{
    return in->p < in->end ? *in->p++ : 0;
}

static inline llmcb_str fuzz_slice(const char *s, size_t n)
{
    llmcb_str r = { s, n };

    return r;
}

static inline llmcb_str fuzz_str(const char *s)
{
    return fuzz_slice(s, strlen(s));
}

static inline llmcb_str fuzz_rest(const fuzz_in *in)
{
    return fuzz_slice((const char *)in->p, (size_t)(in->end - in->p));
}

/* For what the library leaves to chance. */
static inline uint64_t fuzz_seed(void)
{
    const char *s = getenv("SEED");

    return s ? strtoull(s, NULL, 10) : 1;
}

/* ---- the heap: exact blocks that always move ---------------------------- */

static struct {
    size_t live, calls, fail_at; /* fail_at 0: never */
    bool for_ever;
} fuzz_heap;

static inline void *fuzz_resize(void *user, void *ptr, size_t old, size_t size)
{
    char *fresh = NULL, *base = ptr ? (char *)ptr - 16 : NULL;
    size_t had = 0;

    (void)user;
    if (base) memcpy(&had, base, sizeof had);
    FUZZ_CHECK(had == old);
    if (size) {
        fuzz_heap.calls++;
        if (fuzz_heap.calls == fuzz_heap.fail_at ||
            (fuzz_heap.for_ever && fuzz_heap.fail_at &&
             fuzz_heap.calls > fuzz_heap.fail_at))
            return NULL;
        fresh = (char *)malloc(size + 16);
        if (!fresh) abort();
        memcpy(fresh, &size, sizeof size);
        if (base) memcpy(fresh + 16, ptr, had < size ? had : size);
    }
    fuzz_heap.live += size - had;
    free(base);
    return fresh ? fresh + 16 : NULL;
}

static const llmcb_allocator fuzz_alloc = { fuzz_resize, NULL };

static inline void fuzz_heap_set(size_t fail_at, bool for_ever)
{
    memset(&fuzz_heap, 0, sizeof fuzz_heap);
    fuzz_heap.fail_at = fail_at;
    fuzz_heap.for_ever = for_ever;
}

/* ---- pieces ------------------------------------------------------------- */

/* A copy without a byte to spare, to be freed. */
static inline char *fuzz_copy(const char *s, size_t n)
{
    char *copy = (char *)malloc(n ? n : 1);

    if (!copy) abort();
    if (n) memcpy(copy, s, n);
    return copy;
}

/* How much of `left` bytes the next piece takes. *rng 0: all; 1: one byte;
 * else by chance, mostly a few. */
static inline size_t fuzz_cut(uint32_t *rng, size_t left)
{
    size_t n;

    if (*rng < 2 || left < 2) return *rng == 1 && left ? 1 : left;
    *rng ^= *rng << 13;
    *rng ^= *rng >> 17;
    *rng ^= *rng << 5;
    if (*rng < 2) *rng = 2;
    n = 1 + (*rng >> 8) % (*rng % 4 ? 12 : 200);
    return n < left ? n : left;
}

/* ---- logs --------------------------------------------------------------- */

static const llmcb_allocator fuzz_plain = { llmcbi_default_resize, NULL };

static inline void fuzz_note(llmcbi_buf *log, const char *s, size_t n)
{
    llmcbi_buf_add(&fuzz_plain, log, s, n);
}

static inline void fuzz_note_int(llmcbi_buf *log, int64_t v)
{
    llmcbi_buf_print(&fuzz_plain, log, "%d", v);
    fuzz_note(log, " ", 1);
}

/* With its length, so that two texts are never taken for one. */
static inline void fuzz_note_str(llmcbi_buf *log, llmcb_str s)
{
    fuzz_note_int(log, (int64_t)s.len);
    fuzz_note(log, s.ptr, s.len);
}

static inline bool fuzz_same(const llmcbi_buf *a, const llmcbi_buf *b)
{
    return llmcbi_str_equal(llmcbi_buf_str(a), llmcbi_buf_str(b));
}

static inline void fuzz_drop(llmcbi_buf *b)
{
    llmcbi_buf_free(&fuzz_plain, b);
}

/* ---- a second reader of JSON, on the stack ------------------------------ */

static inline const char *fuzz_json_space(const char *p, const char *end)
{
    while (p < end && memchr(" \t\r\n", *p, 4))
        p++;
    return p;
}

static inline const char *fuzz_json_string(const char *p, const char *end)
{
    int i;

    for (p++; p < end && *p != '"'; p++) {
        if ((unsigned char)*p < 0x20) return NULL;
        if (*p != '\\') continue;
        if (++p == end || !memchr("\"\\/bfnrtu", *p, 9)) return NULL;
        if (*p != 'u') continue;
        for (i = 0; i < 4; i++)
            if (++p == end || !*p || !strchr("0123456789abcdefABCDEF", *p))
                return NULL;
    }
    return p < end ? p + 1 : NULL;
}

static inline const char *fuzz_json_digits(const char *p, const char *end)
{
    const char *begin = p;

    while (p < end && *p >= '0' && *p <= '9')
        p++;
    return p > begin ? p : NULL;
}

static inline const char *fuzz_json_number(const char *p, const char *end)
{
    if (*p == '-') p++;
    if (p < end && *p == '0')
        p++;
    else
        p = fuzz_json_digits(p, end);
    if (p && p < end && *p == '.') p = fuzz_json_digits(p + 1, end);
    if (p && p < end && (*p == 'e' || *p == 'E')) {
        p++;
        if (p < end && (*p == '+' || *p == '-')) p++;
        p = fuzz_json_digits(p, end);
    }
    return p;
}

/* The end of the value at p with white space, or NULL. */
static inline const char *fuzz_json_value(const char *p, const char *end,
                                          unsigned depth)
{
    static const char *const words[] = { "true", "false", "null" };
    bool object;
    int i;

    p = fuzz_json_space(p, end);
    if (p == end) return NULL;
    for (i = 0; i < 3; i++)
        if ((size_t)(end - p) >= strlen(words[i]) &&
            memcmp(p, words[i], strlen(words[i])) == 0)
            return fuzz_json_space(p + strlen(words[i]), end);
    if (*p == '"' || (*p != '{' && *p != '[')) {
        p = *p == '"' ? fuzz_json_string(p, end) : fuzz_json_number(p, end);
        return p ? fuzz_json_space(p, end) : NULL;
    }
    if (depth == LLMCBI_JSON_DEPTH) return NULL;
    object = *p == '{';
    p = fuzz_json_space(p + 1, end);
    if (p < end && *p == (object ? '}' : ']'))
        return fuzz_json_space(p + 1, end);
    for (;;) {
        if (object) {
            p = fuzz_json_space(p, end);
            if (p == end || *p != '"') return NULL;
            p = fuzz_json_string(p, end);
            if (!p) return NULL;
            p = fuzz_json_space(p, end);
            if (p == end || *p++ != ':') return NULL;
        }
        p = fuzz_json_value(p, end, depth + 1);
        if (!p || p == end) return NULL;
        if (*p == (object ? '}' : ']')) return fuzz_json_space(p + 1, end);
        if (*p++ != ',') return NULL;
    }
}

static inline bool fuzz_json_valid(llmcb_str s)
{
    return fuzz_json_value(s.ptr, s.ptr + s.len, 0) == s.ptr + s.len;
}

/* ---- replay: each file named as argument -------------------------------- */

static inline int fuzz_replay(int (*run)(const uint8_t *data, size_t size),
                              int argc, char **argv)
{
    int i;

    for (i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        llmcbi_buf b;
        char part[4096];
        size_t n;
        char *exact;

        if (!f) {
            perror(argv[i]);
            return 2;
        }
        memset(&b, 0, sizeof b);
        while ((n = fread(part, 1, sizeof part, f)) > 0)
            fuzz_note(&b, part, n);
        fclose(f);
        exact = fuzz_copy(b.ptr, b.len);
        alarm(30); /* one that hangs is a find, too */
        run((const uint8_t *)exact, b.len);
        free(exact);
        fuzz_drop(&b);
    }
    printf("%d inputs\n", argc - 1);
    return 0;
}

#ifndef FUZZ_ENGINE
int main(int argc, char **argv)
{
    return fuzz_replay(LLVMFuzzerTestOneInput, argc, argv);
}
#endif
#endif
