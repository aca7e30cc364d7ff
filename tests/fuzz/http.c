/* [HTTP]: a response in one piece, in pieces and byte by byte reads the same,
 * and a length is kept to. Options: limits, cuts, failing allocation. */
#include "fuzz.h"
#include <strings.h>

typedef struct reading {
    llmcbi_buf head, body;
    llmcbi_h1_type type;
    llmcb_code code;
    llmcb_ending ending;
    size_t taken;
    bool has_length, chunked;
    int status;
    unsigned long long length;
} reading;

static void note_header(reading *r, const llmcbi_field *h)
{
    size_t i;

    for (i = 0; i < h->value.len; i++)
        FUZZ_CHECK((unsigned char)h->value.ptr[i] >= 0x20 ||
                   h->value.ptr[i] == '\t');
    FUZZ_CHECK(h->name.len && !memchr(h->name.ptr, ' ', h->name.len));
    if (h->name.len == 14 && !strncasecmp(h->name.ptr, "Content-Length", 14)) {
        llmcbi_buf digits;
        memset(&digits, 0, sizeof digits);
        fuzz_note(&digits, h->value.ptr, h->value.len);
        r->length = strtoull(digits.ptr, NULL, 10);
        r->has_length = true;
        fuzz_drop(&digits);
    }
    if (h->name.len == 17 && !strncasecmp(h->name.ptr, "Transfer-Encod", 14))
        r->chunked = true;
    fuzz_note_str(&r->head, h->name);
    fuzz_note_str(&r->head, h->value);
}

static void read_all(reading *r, llmcb_str s, const llmcb_limits *limits,
                     uint32_t rng)
{
    llmcbi_found found;
    size_t i;
    llmcbi_h1 h;

    memset(r, 0, sizeof *r);
    llmcbi_h1_init(&h, limits);
    do {
        size_t n = fuzz_cut(&rng, s.len - r->taken);
        char *piece = fuzz_copy(s.ptr + r->taken, n);
        const char *p = piece;
        do {
            r->type = llmcbi_h1_next(&fuzz_alloc, &h, &p, piece + n, &found);
            if (r->type == LLMCBI_H1_STATUS) {
                fuzz_note_int(&r->head, h.status);
                FUZZ_CHECK(h.status >= 200 && h.status < 600);
            } else if (r->type == LLMCBI_H1_HEADER) {
                note_header(r, &found.field);
            } else if (r->type == LLMCBI_H1_DATA) {
                FUZZ_CHECK(found.n > 0);
                for (i = 0; i < found.n; i++) {
                    FUZZ_CHECK(found.pieces[i].len > 0);
                    fuzz_note(&r->body, found.pieces[i].ptr,
                              found.pieces[i].len);
                }
            }
            FUZZ_CHECK(h.line.len <= limits->header_line);
        } while (r->type == LLMCBI_H1_STATUS || r->type == LLMCBI_H1_HEADER ||
                 r->type == LLMCBI_H1_DATA);
        FUZZ_CHECK(r->type != LLMCBI_H1_MORE || p == piece + n);
        r->taken += (size_t)(p - piece);
        free(piece);
    } while (r->taken < s.len && r->type == LLMCBI_H1_MORE);
    r->status = h.status;
    r->code = llmcbi_h1_why(&h)->code;
    if (r->type != LLMCBI_H1_ERROR) {
        r->ending = llmcbi_h1_eof(&h);
        r->code = llmcbi_h1_why(&h)->code;
    }
    FUZZ_CHECK(r->body.len <= limits->body);
    FUZZ_CHECK(h.fields <= limits->header_fields || r->code == LLMCB_ELIMIT);
    llmcbi_h1_free(&fuzz_alloc, &h);
    FUZZ_CHECK(fuzz_heap.live == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_in in = { data, data + size };
    unsigned small = fuzz_byte(&in), cuts = fuzz_byte(&in);
    unsigned fail_at = fuzz_byte(&in);
    llmcb_limits limits;
    reading r[4];
    int i;

    memset(&limits, 0, sizeof limits);
    llmcbi_limits_default(&limits);
    if (small & 1) limits.header_line = 16 + small;
    if (small & 2) limits.header_block = 32 + small;
    if (small & 4) limits.header_fields = small >> 6;
    if (small & 8) limits.body = small;
    for (i = 0; i < 4; i++) {
        fuzz_heap_set(i == 3 ? fail_at : 0, true);
        read_all(&r[i], fuzz_rest(&in), &limits,
                 i < 2 ? (uint32_t)i : 2 + cuts * 2654435761u);
        if (i == 3 && r[i].code == LLMCB_ENOMEM) break;
        FUZZ_CHECK(r[i].type == r[0].type && r[i].code == r[0].code);
        FUZZ_CHECK(r[i].ending == r[0].ending);
        FUZZ_CHECK(r[i].type != LLMCBI_H1_END || r[i].taken == r[0].taken);
        FUZZ_CHECK(fuzz_same(&r[i].head, &r[0].head));
        FUZZ_CHECK(fuzz_same(&r[i].body, &r[0].body));
    }
    FUZZ_CHECK(!r->has_length || r->body.len <= r->length || r->chunked);
    if (r->type == LLMCBI_H1_END && !r->chunked && r->status != 204 &&
        r->status != 304)
        FUZZ_CHECK(r->has_length && r->body.len == r->length);
    for (i = 0; i < 4; i++) {
        fuzz_drop(&r[i].head);
        fuzz_drop(&r[i].body);
    }
    return 0;
}
