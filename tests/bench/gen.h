/* The text of the load server, and its events as they stand on the wire.
 *
 * GEN_RING tokens are rendered once, each as one chunk with one event, in the
 * form that OpenAI's servers send. Stream `seed` begins at a place of its own
 * and goes round, so that a stream that is lost, doubled or mixed up with
 * another changes the checksum, and a write of any number of events is one
 * stretch of memory. Some tokens have escapes, some bytes above 0x7F. */
#ifndef GEN_H
#define GEN_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GEN_RING 4096u
#define GEN_MAX_WRITE 1024u /* events behind the ring, for the wrap */

#define GEN_HEAD                                            \
    "HTTP/1.1 200 OK\r\n"                                   \
    "Content-Type: text/event-stream; charset=utf-8\r\n"    \
    "openai-processing-ms: 42\r\n"                          \
    "openai-version: 2020-10-01\r\n"                        \
    "x-ratelimit-remaining-requests: 9999\r\n"              \
    "x-request-id: req_bench\r\n"                           \
    "Cache-Control: no-cache\r\n"                           \
    "Transfer-Encoding: chunked\r\n"                        \
    "Connection: keep-alive\r\n\r\n"

#define GEN_BEFORE                                                       \
    "data: {\"id\":\"chatcmpl-bn-00000000\",\"object\":"                 \
    "\"chat.completion.chunk\",\"created\":1700000000,\"model\":"        \
    "\"gpt-4o-mini-2024-07-18\",\"service_tier\":\"default\","           \
    "\"system_fingerprint\":\"fp_560af6e559\",\"choices\":"

#define GEN_ID 21u /* where an event's digits begin, from "data: " on */

typedef struct gen {
    char *bytes;
    size_t *at; /* GEN_RING + GEN_MAX_WRITE + 1 borders */
    char head[1024], tail[1024];
    size_t head_len, tail_len, usage_at;
} gen;

static inline uint32_t gen_next(uint32_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 17;
    *x ^= *x << 5;
    return *x;
}

/* The ring's token i, as it is written in JSON. */
static inline void gen_text(char *out, size_t size, uint32_t i)
{
    static const char *const words[] = {
        " the",   " of",    " a",     " token",   " stream", " to",
        "ing",    " and",   " is",    " handler", " event",  " in",
        " that",  ",",      ".",      " it",      " loop",   " for",
        " was",   " callback", " on", " are",     "ed",      " as",
        " with",  " his",   " they",  " at",      "s",       " one",
        " have",  " this",  " from",  " or",      " had",    " asynchronous",
    };
    uint32_t x = i * 2654435761u + 12345u, r = gen_next(&x);

    if (i % 31 == 7) snprintf(out, size, "\\n\\n");
    else if (i % 43 == 11) snprintf(out, size, " \\\"%u\\\"", r % 1000);
    else if (i % 53 == 17) snprintf(out, size, " caf\xC3\xA9%u", r % 10);
    else if (i % 97 == 29) snprintf(out, size, "\\u2713\\ud83d\\ude00");
    else if (i % 19 == 3) snprintf(out, size, " %u", r % 10000);
    else snprintf(out, size, "%s", words[r % (sizeof words / sizeof *words)]);
}

/* One chunk with one event: what stands in "choices", and behind it. */
static inline size_t gen_chunk(char *out, size_t size, const char *choices,
                               const char *behind)
{
    int len = (int)(sizeof GEN_BEFORE - 1 + strlen(choices) + strlen(behind) +
                    3);

    return (size_t)snprintf(out, size, "%x\r\n%s%s%s}\n\n\r\n",
                            (unsigned)len, GEN_BEFORE, choices, behind);
}

/* What a token comes as. */
enum { GEN_CONTENT, GEN_REASONING, GEN_TOOL };

/* obfuscation: a member of random length in each event, as OpenAI's own
 * servers add it, so that no two events have the same length. */
static inline void gen_init(gen *g, int obfuscation, unsigned member)
{
    static const char *const members[][2] = {
        { "\"content\":\"", "\"" },
        { "\"content\":null,\"reasoning_content\":\"", "\"" },
        { "\"tool_calls\":[{\"index\":0,\"function\":{\"arguments\":\"",
          "\"}}]" },
    };
    static const char noise[] = "aB3dE5gH7jK9mN1pQ";
    size_t cap = (GEN_RING + GEN_MAX_WRITE) * 420u, used = 0;
    char choices[256], behind[64] = "";
    uint32_t i;

    g->bytes = (char *)malloc(cap);
    g->at = (size_t *)malloc((GEN_RING + GEN_MAX_WRITE + 1) * sizeof *g->at);
    if (!g->bytes || !g->at) {
        fprintf(stderr, "gen: no memory\n");
        exit(2);
    }
    for (i = 0; i < GEN_RING + GEN_MAX_WRITE; i++) {
        uint32_t k = i % GEN_RING, x = k * 40503u + 7u;
        char text[64];
        gen_text(text, sizeof text, k);
        snprintf(choices, sizeof choices,
                 "[{\"index\":0,\"delta\":{%s%s%s},"
                 "\"logprobs\":null,\"finish_reason\":null}]",
                 members[member][0], text, members[member][1]);
        if (obfuscation)
            snprintf(behind, sizeof behind, ",\"obfuscation\":\"%.*s\"",
                     (int)(gen_next(&x) % 16), noise);
        g->at[i] = used;
        used += gen_chunk(g->bytes + used, cap - used, choices, behind);
    }
    g->at[i] = used;
    g->head_len = sizeof GEN_HEAD - 1;
    memcpy(g->head, GEN_HEAD, g->head_len);
    g->head_len += gen_chunk(
        g->head + g->head_len, sizeof g->head - g->head_len,
        "[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\","
        "\"refusal\":null},\"logprobs\":null,\"finish_reason\":null}]", "");
    g->tail_len = gen_chunk(g->tail, sizeof g->tail,
                            "[{\"index\":0,\"delta\":{},\"logprobs\":null,"
                            "\"finish_reason\":\"length\"}]", "");
    g->usage_at = g->tail_len;
}

/* Gives the event in this chunk the id of its stream: no two have the same. */
static inline void gen_stamp(char *chunk, uint32_t seed)
{
    static const char hex[] = "0123456789abcdef";
    char *id = chunk + 2;
    int i;

    while (*id++ != '\n') {
    }
    for (i = 0; i < 8; i++)
        id[GEN_ID + i] = hex[seed >> (28 - 4 * i) & 15];
}

/* What follows the last token: finish, the usage if it was asked for, the
 * sentinel and the last chunk. Returns its length. */
static inline size_t gen_tail(const gen *g, char *out, size_t size,
                              uint32_t seed, unsigned tokens, int usage)
{
    size_t n = g->tail_len;
    char numbers[128], *second = out + n;

    memcpy(out, g->tail, n);
    gen_stamp(out, seed);
    if (usage) {
        snprintf(numbers, sizeof numbers,
                 ",\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":%u,"
                 "\"total_tokens\":%u}", tokens, tokens + 11);
        n += gen_chunk(out + n, size - n, "[]", numbers);
        gen_stamp(second, seed);
    }
    return n + (size_t)snprintf(out + n, size - n,
                                "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
}

/* Where a stream begins in the ring. */
static inline uint32_t gen_start(uint32_t seed)
{
    return seed * 2654435761u >> 20; /* the upper 12 bits: 0 to 4095 */
}

#endif
