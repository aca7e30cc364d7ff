/* [JSON]: strings decoded. One byte or escape from all that may have come
 * before is any string: a whole one is that, again and again. Bytes above 0x7F
 * may be taken at once. */
/* reached: 90 */
/* eva: -eva-slevel-function decode:2000 */
/* eva: -inline-calls llmcbi_put_byte,llmcbi_carry_flush */
/* eva: -inline-calls llmcbi_put_replacement,llmcbi_put_utf8 */
/* eva: -inline-calls llmcbi_json_decode,llmcbi_json_copy,llmcbi_utf8_at */
/* eva: -eva-slevel-function at_once:2000 */
#include "proof.h"

static void decode(void)
{
    int kind = Frama_C_interval(0, 8), n = Frama_C_interval(0, 3);
    int high = Frama_C_interval(0, 1), unit = Frama_C_interval(0, 2);
    int part = Frama_C_interval(0, 2), letter = Frama_C_interval(0, 7);
    llmcbi_carry c;
    char *in, *out;
    size_t len, room, did, left;

    /*@ split kind; */
    /*@ split n; */
    /*@ split high; */
    /*@ split unit; */
    /*@ split part; */
    /*@ split letter; */
    if (unit == 1 ? part > 0 : letter > 0) return;
    if (kind ? n == 0 || n >= CARRY_SIZE(kind) : n > 0) return;
    c = any_carry(kind, n, high);
    len = unit == 0 ? 1 : unit == 1 ? 2 : 6;
    in = any_bytes(len);
    if (unit == 0) {
        in[0] = any_but('\\', part);
    } else {
        in[0] = '\\';
        in[1] = unit == 1 ? "\"\\/bfnrt"[letter] : 'u';
    }
    room = 3 * len + (kind ? 3 : 0) + (high ? 3 : 0);
    out = (char *)malloc(room);
    did = llmcbi_json_decode(out, in, len, &c);
    left = (c.n ? 3 : 0) + (c.high ? 3 : 0);
    /*@ assert paid: did + left <= room; */
    /*@ assert carry: c.n <= 3; */
    /*@ assert high: c.high == 0 || 0xD800 <= c.high <= 0xDBFF; */
}

static void at_once(void)
{
    int len = Frama_C_interval(1, 4), i;
    const char *from;
    char *in, *out, *to;

    /*@ split len; */
    in = any_bytes((size_t)len);
    out = (char *)malloc((size_t)len);
    for (i = 0; i < len; i++)
        in[i] = Frama_C_char_interval(-128, -1);
    from = in;
    to = llmcbi_json_copy(out, &from, in + len);
    /*@ assert read: in <= from <= in + len; */
    /*@ assert written: to - out == from - in; */
}

int main(void)
{
    decode();
    at_once();
    return 0;
}
