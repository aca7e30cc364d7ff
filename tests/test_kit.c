/* The ready-made handlers, the rate limiter and the cache; and the chains of
 * examples/chain.c, which is included. Time is virtual, answers are recorded
 * in memory, files are in a directory of the test's own. Nothing sleeps. */
#if !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- the file that a handler writes: counted, cut, failing --------------- */

static struct disk {
    int fd;            /* what was opened for appending; -1: nothing */
    unsigned writes;   /* to it */
    size_t at_most;    /* bytes a write; 0: all */
    unsigned eintr;    /* so many writes are interrupted first */
    long room;         /* bytes until the disk is full; -1: endless */
    int opened, closed;
    int flags;
} disk = { -1, 0, 0, 0, -1, 0, 0, 0 };

static int hook_open(const char *path, int flags, ...)
{
    mode_t mode = 0;
    int fd;

    if (flags & O_CREAT) {
        va_list ap;
        va_start(ap, flags);
        mode = (mode_t)va_arg(ap, int);
        va_end(ap);
    }
    fd = open(path, flags, mode);
    if (fd >= 0 && (flags & O_APPEND)) {
        disk.fd = fd;
        disk.opened++;
        disk.flags = flags;
    }
    return fd;
}

static int hook_close(int fd)
{
    if (fd == disk.fd) {
        disk.closed++;
        disk.fd = -1;
    }
    return close(fd);
}

static ssize_t hook_write(int fd, const void *p, size_t n)
{
    if (fd != disk.fd) return write(fd, p, n);
    disk.writes++;
    if (disk.eintr) {
        disk.eintr--;
        errno = EINTR;
        return -1;
    }
    if (disk.at_most && n > disk.at_most) n = disk.at_most;
    if (disk.room >= 0 && n > (size_t)disk.room) n = (size_t)disk.room;
    if (!n) {
        errno = ENOSPC;
        return -1;
    }
    if (disk.room >= 0) disk.room -= (long)n;
    return write(fd, p, n);
}

/* A call without a hook stays what it is. */
#define HOOK_open 0, hook_open
#define HOOK_close 0, hook_close
#define HOOK_write 0, hook_write
#define SECOND_(a, b, ...) b
#define SECOND(...) SECOND_(__VA_ARGS__)
#define LLMCBI_SYS(call) SECOND(HOOK_##call, call, 0)
#include "scene.h"

#define main chain_main
#include "../examples/chain.c"
#undef main

#define KEY "sk-CANARY-4f1d9b7c2e"
#define PROMPT "canary-prompt-77ab"

/* ---- files ------------------------------------------------------------------ */

static char dir[64], path[128];

static void disk_init(void)
{
    strcpy(dir, "/tmp/llmcb-kit-XXXXXX");
    if (!mkdtemp(dir)) abort();
    snprintf(path, sizeof path, "%s/out", dir);
    memset(&disk, 0, sizeof disk);
    disk.fd = -1;
    disk.room = -1;
}

static void disk_close(void)
{
    remove(path);
    rmdir(dir);
}

static char file_text[1 << 20];

static const char *read_file(const char *name)
{
    FILE *f = fopen(name, "r");
    size_t n = f ? fread(file_text, 1, sizeof file_text - 1, f) : 0;

    file_text[n] = '\0';
    if (f) fclose(f);
    return file_text;
}

/* A stream into memory, and what is in it. */
typedef struct page {
    FILE *f;
    char *text;
    size_t len;
} page;

static void page_open(page *p)
{
    memset(p, 0, sizeof *p);
    p->f = open_memstream(&p->text, &p->len);
    if (!p->f) abort();
}

static const char *page_text(page *p)
{
    fflush(p->f);
    return p->text;
}

static void page_close(page *p)
{
    fclose(p->f);
    free(p->text);
}

/* ---- a judge of JSON that is not the library's ------------------------------ */

static const char *json_value(const char *p, int depth);

static const char *json_string(const char *p)
{
    if (*p++ != '"') return NULL;
    while (*p != '"') {
        unsigned char c = (unsigned char)*p++;
        if (c < 0x20 || c == 0x7F) return NULL;
        if (c == '\\') {
            if (!*p || !strchr("\"\\/bfnrtu", *p)) return NULL;
            if (*p++ == 'u') {
                int i;
                for (i = 0; i < 4; i++)
                    if (!*p || !strchr("0123456789abcdefABCDEF", *p++))
                        return NULL;
            }
        } else if (c >= 0x80) {
            int more = c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : 1;
            if (c < 0xC2 || c > 0xF4) return NULL;
            while (more--)
                if (((unsigned char)*p++ & 0xC0) != 0x80) return NULL;
        }
    }
    return p + 1;
}

static const char *json_list(const char *p, char end, int depth)
{
    p++;
    if (*p == end) return p + 1;
    for (;;) {
        if (end == '}') {
            p = json_string(p);
            if (!p || *p++ != ':') return NULL;
        }
        p = json_value(p, depth);
        if (!p) return NULL;
        if (*p == end) return p + 1;
        if (*p++ != ',') return NULL;
    }
}

static const char *json_value(const char *p, int depth)
{
    if (depth > 20) return NULL;
    if (*p == '{') return json_list(p, '}', depth + 1);
    if (*p == '[') return json_list(p, ']', depth + 1);
    if (*p == '"') return json_string(p);
    if (strncmp(p, "true", 4) == 0) return p + 4;
    if (strncmp(p, "null", 4) == 0) return p + 4;
    if (strncmp(p, "false", 5) == 0) return p + 5;
    if (*p == '-') p++;
    if (*p < '0' || *p > '9') return NULL;
    while (*p >= '0' && *p <= '9') p++;
    return p;
}

/* Lines that are one object each; how many. -1: something else. */
static int json_lines(const char *p)
{
    int n = 0;

    while (*p) {
        if (*p != '{') return -1;
        p = json_value(p, 0);
        if (!p || *p++ != '\n') return -1;
        n++;
    }
    return n;
}

/* ---- a handler that writes down everything, and the scenery ----------------- */

typedef struct entry {
    llmcb_event_kind kind;
    char id[37], parent[37], name[40], tags[80];
    uint64_t seq;
    int64_t at;
    llmcb_error error;
    char output[200];
} entry;

typedef struct book {
    llmcb_handler h; /* first */
    entry e[400];
    size_t n;
    char order[8192]; /* on_... without the on_, name and tags */
} book;

static int book_told(llmcb_handler *h, const llmcb_event *ev)
{
    book *b = (book *)(void *)h;
    entry *e = &b->e[b->n];
    size_t i, len = strlen(b->order);

    if (b->n == sizeof b->e / sizeof *b->e) return 0;
    b->n++;
    memset(e, 0, sizeof *e);
    e->kind = ev->kind;
    strcpy(e->id, ev->run->id);
    strcpy(e->parent, ev->run->parent_id);
    snprintf(e->name, sizeof e->name, "%s", ev->run->name);
    for (i = 0; i < ev->run->n_tags; i++)
        snprintf(e->tags + strlen(e->tags), sizeof e->tags - strlen(e->tags),
                 "%s%s", i ? "," : "", ev->run->tags[i]);
    e->seq = ev->seq;
    e->at = ev->start ? ev->run->started_ms : ev->run->finished_ms;
    if (ev->error) e->error = *ev->error;
    if (ev->output)
        snprintf(e->output, sizeof e->output, "%s", ev->output->text.ptr);
    snprintf(b->order + len, sizeof b->order - len, "%s%s %s%s%s",
             len ? "; " : "", llmcb_event_name(ev->kind) + 3, e->name,
             *e->tags ? " " : "", e->tags);
    return 0;
}

static llmcb_handler *book_init(book *b)
{
    llmcb_sync_fn *fn = (llmcb_sync_fn *)(void *)&b->h.sync;
    size_t i;

    memset(b, 0, sizeof *b);
    for (i = 0; i < sizeof b->h.sync / sizeof *fn; i++) fn[i] = book_told;
    b->h.sync.on_llm_new_token = NULL;
    b->h.flags = LLMCB_INLINE;
    return &b->h;
}

static const entry *book_find(const book *b, llmcb_event_kind kind,
                              const char *name, size_t nth)
{
    size_t i;

    for (i = 0; i < b->n; i++)
        if (b->e[i].kind == kind && strcmp(b->e[i].name, name) == 0 && !nth--)
            return &b->e[i];
    return NULL;
}

/* Each run started once and finished once. */
static void book_check(const book *b)
{
    size_t i, k;

    for (i = 0; i < b->n; i++) {
        unsigned starts = 0, ends = 0;
        for (k = 0; k < b->n; k++) {
            llmcb_event_kind kind = b->e[k].kind;
            if (strcmp(b->e[i].id, b->e[k].id) != 0) continue;
            starts += b->e[k].seq == 1;
            ends += kind == LLMCB_CHAIN_END || kind == LLMCB_CHAIN_ERROR ||
                    kind == LLMCB_LLM_END || kind == LLMCB_LLM_ERROR ||
                    kind == LLMCB_TOOL_END || kind == LLMCB_TOOL_ERROR ||
                    kind == LLMCB_RETRIEVER_END ||
                    kind == LLMCB_RETRIEVER_ERROR;
        }
        if (starts != 1 || ends != 1)
            TEST_FAIL("%s: %u starts, %u ends", b->e[i].name, starts, ends);
    }
}

#define JSON_HEAD "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
#define FAIL_HEAD(status) \
    "HTTP/1.1 " status " X\r\nContent-Length: 0\r\n\r\n"
#define USED(model, in, out) \
    "{\"model\":\"" model "\",\"choices\":[],\"usage\":{\"prompt_tokens\":" in \
    ",\"completion_tokens\":" out ",\"total_tokens\":" in out "}}"

/* One response of any bytes, after a while. */
static void tape_raw(scene *s, const char *bytes, int64_t ms)
{
    size_t i = s->n_tapes++;

    s->bytes[i] = (char *)malloc(strlen(bytes) + 1);
    s->segments[i] = (llmcb_segment *)malloc(sizeof *s->segments[i]);
    if (!s->bytes[i] || !s->segments[i]) abort();
    strcpy(s->bytes[i], bytes);
    s->tapes[i].bytes = s->bytes[i];
    s->tapes[i].len = strlen(bytes);
    s->tapes[i].end = LLMCB_REPLAY_CLOSE;
    s->segments[i][0].offset = 0;
    s->segments[i][0].delay_ms = ms;
    s->tapes[i].segments = s->segments[i];
    s->tapes[i].n_segments = 1;
}

/* A scene whose chat serves no handler of its own. */
static void scene_begin(scene *s)
{
    if (!scene_open(s)) abort();
}

static llmcb_config config_of(llmcb_handler **callbacks, size_t n)
{
    llmcb_config c;

    memset(&c, 0, sizeof c);
    c.callbacks = callbacks;
    c.n_callbacks = n;
    return c;
}

static llmcb_op *ask_with(llmcb_chat *chat, const char *text,
                          llmcb_handler **callbacks, size_t n)
{
    llmcb_config c = config_of(callbacks, n);
    llmcb_message m;

    memset(&m, 0, sizeof m);
    m.content = text;
    return llmcb_chat_generate(chat, &m, 1, &c);
}

/* Asks and waits. */
static llmcb_code asked(llmcb_chat *chat, const char *text,
                        llmcb_handler **callbacks, size_t n)
{
    llmcb_op *op = ask_with(chat, text, callbacks, n);
    llmcb_code code = llmcb_op_wait(op);

    llmcb_op_free(op);
    return code;
}

static llmcb_chat *chat_with(scene *s, llmcb_limiter *limiter,
                             llmcb_cache *cache, void (*more)(llmcb_chat_desc *))
{
    llmcb_chat_desc d = s->cd;

    d.limiter = limiter;
    d.cache = cache;
    if (more) more(&d);
    return llmcb_chat_new(s->loop, &d);
}

/* A run of the program's own, by hand. */
static llmcb_op *run_new(llmcb_loop *loop, llmcb_run_kind kind,
                         const char *name, const llmcb_config *config)
{
    llmcb_run_desc d;
    llmcb_op *op;

    memset(&d, 0, sizeof d);
    d.kind = kind;
    d.name = name;
    d.input = llmcb_text("the input");
    op = llmcb_run_start(loop, &d, config);
    return op;
}

static llmcb_op *run_in(llmcb_loop *loop, llmcb_op *parent,
                        llmcb_run_kind kind, const char *name)
{
    llmcb_config c = llmcb_run_child(llmcb_op_run(parent), NULL);

    return run_new(loop, kind, name, &c);
}

/* ---- chains: examples/chain.c ---------------------------------------------- */

typedef struct stage {
    llmcb_loop *loop;
    book b;
    llmcb_handler *callbacks[1];
    llmcb_config config;
    struct runnable gpt, busy, poet, ask, parse;
} stage;

static void stage_open(stage *g)
{
    llmcb_loop_desc d;

    memset(&d, 0, sizeof d);
    memset(g, 0, sizeof *g);
    d.virtual_clock = true;
    g->loop = llmcb_loop_new(&d);
    g->callbacks[0] = book_init(&g->b);
    g->config = config_of(g->callbacks, 1);
    g->gpt = model(g->loop, "examples/recordings/pun.http");
    g->busy = model(g->loop, "examples/recordings/busy.http");
    g->poet = model(g->loop, "examples/recordings/poem.http");
    g->ask = made("ChatPromptTemplate", prompt, NULL, 0);
    g->ask.text = "Tell me a joke about %s.";
    g->parse = made("StrOutputParser", first_line, NULL, 0);
}

static void stage_free(struct runnable *r)
{
    llmcb_op_free(r->op);
    llmcb_chat_free(r->chat);
}

static void stage_close(stage *g, struct runnable *root)
{
    book_check(&g->b);
    stage_free(root);
    stage_free(&g->gpt);
    stage_free(&g->busy);
    stage_free(&g->poet);
    stage_free(&g->ask);
    stage_free(&g->parse);
    CHECK_INT(llmcb_loop_free(g->loop), LLMCB_OK);
}

/* semantics.md 6.1: the order for prompt | model | parser. */
TEST(case_096_a_sequence_of_three)
{
    stage g;
    struct runnable *steps[] = { &g.ask, &g.gpt, &g.parse };
    struct runnable chain = made("RunnableSequence", sequence, steps, 3);
    const char *tags[] = { "outer" };
    const entry *root, *step;

    stage_open(&g);
    g.config.tags = tags;
    g.config.n_tags = 1;
    CHECK_INT(llmcb_op_wait(invoke(&chain, g.loop, llmcb_text("atoms"),
                                   &g.config)),
              LLMCB_OK);
    CHECK_STR(output_of(&chain).ptr,
              "Why don't scientists trust atoms? They make up everything.");
    CHECK_STR(g.b.order,
              "chain_start RunnableSequence outer; "
              "chain_start ChatPromptTemplate outer,seq:step:1; "
              "chain_end ChatPromptTemplate outer,seq:step:1; "
              "chat_model_start ChatOpenAI outer,seq:step:2; "
              "llm_end ChatOpenAI outer,seq:step:2; "
              "chain_start StrOutputParser outer,seq:step:3; "
              "chain_end StrOutputParser outer,seq:step:3; "
              "chain_end RunnableSequence outer");
    root = &g.b.e[0];
    CHECK_STR(root->parent, "");
    step = book_find(&g.b, LLMCB_CHAIN_START, "ChatPromptTemplate", 0);
    CHECK_STR(step->parent, root->id);
    step = book_find(&g.b, LLMCB_CHAT_MODEL_START, "ChatOpenAI", 0);
    CHECK_STR(step->parent, root->id);
    CHECK_INT(step->at, 0);
    step = book_find(&g.b, LLMCB_CHAIN_START, "StrOutputParser", 0);
    CHECK_STR(step->parent, root->id);
    CHECK_INT(step->at, 400);
    step = book_find(&g.b, LLMCB_CHAIN_END, "ChatPromptTemplate", 0);
    CHECK_STR(step->output, "Tell me a joke about atoms.");
    CHECK_STR(g.b.e[g.b.n - 1].output, output_of(&chain).ptr);
    stage_close(&g, &chain);
}

TEST(case_097_the_second_step_fails)
{
    stage g;
    struct runnable *steps[] = { &g.ask, &g.busy, &g.parse };
    struct runnable chain = made("RunnableSequence", sequence, steps, 3);
    const entry *inner, *outer;

    stage_open(&g);
    CHECK_INT(llmcb_op_wait(invoke(&chain, g.loop, llmcb_text("atoms"),
                                   &g.config)),
              LLMCB_EHTTP);
    CHECK_STR(g.b.order,
              "chain_start RunnableSequence; "
              "chain_start ChatPromptTemplate seq:step:1; "
              "chain_end ChatPromptTemplate seq:step:1; "
              "chat_model_start ChatOpenAI seq:step:2; "
              "llm_error ChatOpenAI seq:step:2; "
              "chain_error RunnableSequence");
    inner = book_find(&g.b, LLMCB_LLM_ERROR, "ChatOpenAI", 0);
    outer = book_find(&g.b, LLMCB_CHAIN_ERROR, "RunnableSequence", 0);
    REQUIRE(inner && outer);
    CHECK_INT(outer->error.code, LLMCB_EHTTP);
    CHECK_INT(outer->error.http_status, 503);
    CHECK_STR(outer->error.message, inner->error.message);
    CHECK_STR(outer->error.request_id, "req_mock_busy");
    CHECK_INT(llmcb_op_error(chain.op)->http_status, 503);
    stage_close(&g, &chain);
}

TEST(case_104_fallbacks_have_the_wrapper_as_parent)
{
    stage g;
    struct runnable *parts[] = { &g.busy, &g.gpt };
    struct runnable safe = made("RunnableWithFallbacks", first_of, parts, 2);
    size_t i;

    stage_open(&g);
    CHECK_INT(llmcb_op_wait(invoke(&safe, g.loop, llmcb_text("atoms"),
                                   &g.config)),
              LLMCB_OK);
    CHECK_STR(g.b.order, "chain_start RunnableWithFallbacks; "
                         "chat_model_start ChatOpenAI; llm_error ChatOpenAI; "
                         "chat_model_start ChatOpenAI; llm_end ChatOpenAI; "
                         "chain_end RunnableWithFallbacks");
    for (i = 1; i < 5; i++)
        CHECK_STR(g.b.e[i].parent, g.b.e[0].id);
    CHECK(strcmp(g.b.e[1].id, g.b.e[3].id) != 0);
    stage_close(&g, &safe);
}

TEST(chain_retry_tags_attempts)
{
    stage g;
    struct runnable *parts[] = { &g.busy, &g.busy, &g.busy, &g.busy };
    struct runnable retry = made("RunnableRetry", first_of, parts, 2);
    size_t i;

    stage_open(&g);
    CHECK_INT(llmcb_op_wait(invoke(&retry, g.loop, llmcb_text("x"),
                                   &g.config)),
              LLMCB_EHTTP);
    CHECK_STR(g.b.order,
              "chain_start RunnableRetry; chat_model_start ChatOpenAI; "
              "llm_error ChatOpenAI; "
              "chat_model_start ChatOpenAI retry:attempt:2; "
              "llm_error ChatOpenAI retry:attempt:2; "
              "chain_error RunnableRetry");
    CHECK_STR(g.b.e[g.b.n - 1].error.request_id, "req_mock_busy_2");
    for (i = 1; i < 5; i++)
        CHECK_STR(g.b.e[i].parent, g.b.e[0].id);
    g.b.n = 0;
    *g.b.order = '\0';
    retry.n = 4; /* the fourth answer is one */
    CHECK_INT(llmcb_op_wait(invoke(&retry, g.loop, llmcb_text("x"),
                                   &g.config)),
              LLMCB_OK);
    CHECK_STR(g.b.order,
              "chain_start RunnableRetry; chat_model_start ChatOpenAI; "
              "llm_error ChatOpenAI; "
              "chat_model_start ChatOpenAI retry:attempt:2; "
              "llm_end ChatOpenAI retry:attempt:2; chain_end RunnableRetry");
    stage_close(&g, &retry);
}

TEST(chain_parallel_map)
{
    stage g;
    struct runnable *steps[] = { &g.ask, &g.gpt, &g.parse };
    struct runnable chain = made("RunnableSequence", sequence, steps, 3);
    struct runnable *sides[] = { &chain, &g.poet };
    struct runnable map = made("RunnableParallel", parallel, sides, 2);
    const entry *joke, *poem, *inner;

    stage_open(&g);
    chain.text = "joke";
    g.poet.text = "poem";
    CHECK_INT(llmcb_op_wait(invoke(&map, g.loop, llmcb_text("atoms"),
                                   &g.config)),
              LLMCB_OK);
    joke = book_find(&g.b, LLMCB_CHAIN_START, "RunnableSequence", 0);
    poem = book_find(&g.b, LLMCB_CHAT_MODEL_START, "ChatOpenAI", 0);
    inner = book_find(&g.b, LLMCB_CHAT_MODEL_START, "ChatOpenAI", 1);
    REQUIRE(joke && poem && inner);
    CHECK_STR(joke->tags, "map:key:joke");
    CHECK_STR(joke->parent, g.b.e[0].id);
    CHECK_STR(poem->tags, "map:key:poem");
    CHECK_STR(poem->parent, g.b.e[0].id);
    CHECK_STR(inner->tags, "seq:step:2"); /* local tags are not inherited */
    CHECK_STR(inner->parent, joke->id);
    CHECK_INT(g.b.e[g.b.n - 1].at, 400); /* side by side */
    CHECK(strstr(output_of(&map).ptr, "joke: Why don't"));
    CHECK(strstr(output_of(&map).ptr, "\npoem: A dot"));
    stage_free(&chain);
    stage_close(&g, &map);
}

TEST(chain_cancelled_in_the_middle)
{
    stage g;
    struct runnable *steps[] = { &g.ask, &g.gpt, &g.parse };
    struct runnable chain = made("RunnableSequence", sequence, steps, 3);
    llmcb_op *op;

    stage_open(&g);
    op = invoke(&chain, g.loop, llmcb_text("atoms"), &g.config);
    while (!book_find(&g.b, LLMCB_CHAT_MODEL_START, "ChatOpenAI", 0))
        llmcb_loop_run_once(g.loop, 0);
    llmcb_op_cancel(op);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
    CHECK(book_find(&g.b, LLMCB_LLM_ERROR, "ChatOpenAI", 0));
    CHECK(!book_find(&g.b, LLMCB_CHAIN_START, "StrOutputParser", 0));
    CHECK_INT(g.b.e[g.b.n - 1].error.code, LLMCB_ECANCELLED);
    stage_close(&g, &chain);
}

/* ---- tokens ------------------------------------------------------------------ */

static void token_scene(const char *pieces, bool raw, const char *want)
{
    scene s;
    page p;
    llmcb_handler *h;

    scene_init(&s);
    page_open(&p);
    scene_tape(&s, OK_HEAD, pieces, 0, LLMCB_REPLAY_KEEP);
    scene_begin(&s);
    h = llmcb_token_handler(s.loop, p.f, raw);
    REQUIRE(h);
    CHECK_INT(asked(s.chat, "hi", &h, 1), LLMCB_OK);
    CHECK_STR(page_text(&p), want);
    llmcb_handler_free(h);
    scene_close(&s);
    page_close(&p);
}

TEST(tokens_as_they_come)
{
    token_scene("Hel|lo|, |\\n\\tyou" DONE, false, "Hello, \n\tyou");
}

TEST(fault_113_token_handler)
{
    /* C0, DEL, C1; what turns the direction; what only looks like it */
    token_scene("a\\u001b[2J\\u007f\\r|\\u0085\\u009b|\\u202e\\u2066x\\u2069"
                "|\\u00a0\\u2029\\u00e9" DONE,
                false,
                "a\\x1b[2J\\x7f\\x0d\\u0085\\u009b\\u202e\\u2066x\\u2069"
                "\302\240\342\200\251\303\251");
    token_scene("\\u202a\\u202b\\u202c\\u202d\\u202e\\u2066\\u2067\\u2068"
                "\\u2069" DONE,
                false,
                "\\u202a\\u202b\\u202c\\u202d\\u202e\\u2066\\u2067\\u2068"
                "\\u2069");
}

/* The bytes of one character come in several tokens. */
TEST(fault_113_token_handler_in_pieces)
{
    token_scene("a\302|\233b|\342|\200|\256c|\342\201|\246d|\303|\251" DONE,
                false, "a\\u009bb\\u202ec\\u2066d\303\251");
    token_scene("a\302|b" DONE, false, "a\357\277\275b");
}

TEST(tokens_raw_on_request)
{
    token_scene("a\\u001b[1m\\u0085|\\u202e" DONE, true,
                "a\033[1m\302\205\342\200\256");
}

TEST(tokens_a_full_disk)
{
    scene s;
    FILE *full = fopen("/dev/full", "w");
    llmcb_handler *h;
    char text[] = "x";

    if (!full) SKIP("no /dev/full");
    setvbuf(full, NULL, _IOFBF, 64);
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_begin(&s);
    h = llmcb_token_handler(s.loop, full, false);
    REQUIRE(h);
    CHECK_INT(asked(s.chat, text, &h, 1), LLMCB_OK); /* only logged */
    h->flags |= LLMCB_RAISE;
    CHECK_INT(asked(s.chat, text, &h, 1), LLMCB_EHANDLER);
    llmcb_handler_free(h);
    scene_close(&s);
    fclose(full);
}

/* ---- all events: the file and the trace --------------------------------------- */

static int tool_adds(llmcb_tool_use *use)
{
    return llmcb_tool_answer(use, llmcb_text("canary-tool-42"));
}

static int tool_fails(llmcb_tool_use *use)
{
    return llmcb_tool_fail(use, "no such city");
}

/* Raises every event there is, in runs of two models, a chain, tools and
 * retrievers. `bad` is put wherever the program has a say. */
static void all_events(scene *s, llmcb_handler **callbacks, size_t n,
                       const char *bad, bool check)
{
    static const llmcb_tool adds = { .name = "adds", .call = tool_adds };
    static const llmcb_tool fails = { .name = "fails", .call = tool_fails };
    llmcb_config c = config_of(callbacks, n), in;
    const char *tags[] = { "a \"tag\"", bad };
    llmcb_pair pairs[] = { { "key", "value" }, { "k\"2", bad } };
    llmcb_op *root, *op, *failing;
    llmcb_action action;
    llmcb_tool_call call;
    llmcb_document doc;
    llmcb_error error;
    llmcb_message m;

    c.tags = tags;
    c.n_tags = bad ? 2 : 1;
    c.metadata = pairs;
    c.n_metadata = bad ? 2 : 1;
    root = run_new(s->loop, LLMCB_RUN_CHAIN, "Root \"chain\"", &c);
    if (check) CHECK(root);
    in = llmcb_run_child(llmcb_op_run(root), "step");
    memset(&m, 0, sizeof m);
    m.content = PROMPT;
    op = llmcb_chat_generate(s->chat, &m, 1, &in); /* 429, then an answer */
    llmcb_op_wait(op);
    llmcb_op_free(op);
    op = llmcb_chat_generate(s->chat, &m, 1, &in); /* 400 */
    llmcb_op_wait(op);
    llmcb_op_free(op);
    llmcb_run_text(llmcb_op_run(root), llmcb_text(bad ? bad : "canary-text"));
    llmcb_run_custom(llmcb_op_run(root), "progress", llmcb_text("canary-data"));
    memset(&action, 0, sizeof action);
    action.tool = llmcb_text("adds");
    action.input = llmcb_text("{\"a\":\"canary-arguments\"}");
    action.log = llmcb_text("canary-log");
    llmcb_run_action(llmcb_op_run(root), &action);
    memset(&call, 0, sizeof call);
    call.arguments = llmcb_text("{}");
    op = llmcb_tool_start(s->loop, &adds, &call, &in);
    llmcb_op_wait(op);
    llmcb_op_free(op);
    op = llmcb_tool_start(s->loop, &fails, &call, &in);
    llmcb_op_wait(op);
    llmcb_op_free(op);
    op = run_in(s->loop, root, LLMCB_RUN_RETRIEVER, "finds");
    memset(&doc, 0, sizeof doc);
    doc.content = llmcb_text("canary-document");
    while (op && llmcb_run_end_documents(llmcb_op_run(op), &doc, 1) ==
                     LLMCB_EBUSY)
        llmcb_loop_run_once(s->loop, 0);
    llmcb_op_wait(op);
    llmcb_op_free(op);
    memset(&error, 0, sizeof error);
    error.code = LLMCB_EIO;
    strcpy(error.message, "the index is gone");
    op = run_in(s->loop, root, LLMCB_RUN_RETRIEVER, "loses");
    llmcb_run_fail(llmcb_op_run(op), &error);
    llmcb_op_wait(op);
    llmcb_op_free(op);
    failing = run_in(s->loop, root, LLMCB_RUN_CHAIN, "inner");
    llmcb_run_fail(llmcb_op_run(failing), &error);
    llmcb_op_wait(failing);
    llmcb_op_free(failing);
    llmcb_run_agent_finish(llmcb_op_run(root), llmcb_text("canary-finish"),
                           llmcb_text("canary-said"));
    llmcb_run_end(llmcb_op_run(root), llmcb_text(bad ? bad : "canary-output"));
    llmcb_op_wait(root);
    llmcb_op_free(root);
}

static void all_tapes(scene *s)
{
    s->cd.api_key = KEY;
    tape_raw(s, FAIL_HEAD("429"), 10);
    scene_tape(s, OK_HEAD, "canary-|answer|$|" USED("m-1", "3", "4") "|[DONE]",
               5, LLMCB_REPLAY_KEEP);
    tape_raw(s, FAIL_HEAD("400"), 10);
}

static void jsonl_scene(bool content, const char *bad, const char **text)
{
    scene s;
    llmcb_handler *h;

    disk_init();
    scene_init(&s);
    all_tapes(&s);
    scene_begin(&s);
    h = llmcb_jsonl_handler(s.loop, path, content);
    REQUIRE(h);
    all_events(&s, &h, 1, bad, true);
    llmcb_handler_free(h);
    scene_close(&s);
    *text = read_file(path);
}

TEST(jsonl_every_event_is_one_line_and_one_write)
{
    const char *text;
    struct stat st;
    int i, n;

    umask(0);
    jsonl_scene(true, NULL, &text);
    umask(022);
    n = json_lines(text);
    CHECK(n > 20);
    CHECK_INT(disk.writes, n);
    CHECK_INT(disk.opened, 1);
    CHECK_INT(disk.closed, 1);
    CHECK(disk.flags & O_CLOEXEC);
    CHECK_INT(stat(path, &st), 0);
    CHECK_INT(st.st_mode & 0777, 0600);
    for (i = 0; i < LLMCB_N_EVENTS; i++) {
        char want[64];
        /* it has on_chat_model_start, which then comes instead */
        if (i == LLMCB_LLM_START) continue;
        snprintf(want, sizeof want, "{\"event\":\"%s\",\"time_ms\":",
                 llmcb_event_name((llmcb_event_kind)i));
        if (!strstr(text, want)) TEST_FAIL("no %s", want);
    }
    CHECK(!strstr(text, KEY));
    CHECK(strstr(text, PROMPT));
    CHECK(strstr(text, "canary-answer"));
    CHECK(strstr(text, "canary-text"));
    CHECK(strstr(text, "canary-data"));
    CHECK(strstr(text, "canary-arguments"));
    CHECK(strstr(text, "canary-tool-42"));
    CHECK(strstr(text, "canary-output"));
    CHECK(strstr(text, "\"tags\":[\"a \\\"tag\\\"\",\"step\"]"));
    CHECK(strstr(text, "\"metadata\":{\"key\":\"value\""));
    CHECK(strstr(text, "\"name\":\"Root \\\"chain\\\"\""));
    CHECK(strstr(text, "\"input_tokens\":3,\"output_tokens\":4"));
    CHECK(strstr(text, "\"attempt\":1,\"delay_ms\":"));
    CHECK(strstr(text, "\"http_status\":429"));
    CHECK(strstr(text, "\"http_status\":400"));
    CHECK(strstr(text, "\"code\":\"LLMCB_ETOOL\",\"message\":\"no such city\""));
    CHECK(strstr(text, "\"documents\":1"));
    CHECK(strstr(text, "\"parent_run_id\":\""));
    CHECK(strstr(text, "\"finish_reason\":\"stop\""));
    disk_close();
}

TEST(jsonl_content_only_when_asked)
{
    const char *text;

    jsonl_scene(false, NULL, &text);
    CHECK(json_lines(text) > 20);
    CHECK(!strstr(text, "canary"));
    CHECK(!strstr(text, "CANARY"));
    CHECK(!strstr(text, "the input"));
    CHECK(strstr(text, "\"bytes\":"));
    CHECK(strstr(text, "\"input_tokens\":3,\"output_tokens\":4"));
    CHECK(strstr(text, "\"tool\":\"adds\""));
    disk_close();
}

TEST(jsonl_text_that_is_not_utf8)
{
    const char *text;

    jsonl_scene(true, "x\xff\xc3(\xf0\x9f\x98\xed\xa0\x80\x01\"\\\xc3", &text);
    CHECK(json_lines(text) > 20);
    CHECK(strstr(text, "x\357\277\275\357\277\275("));
    CHECK(strstr(text, "\\\"\\\\\357\277\275\"")); /* cut at the end */
    disk_close();
}

/* A run by hand with one text event; for files that fail. */
static llmcb_code one_run(scene *s, llmcb_handler *h)
{
    llmcb_config c = config_of(&h, 1);
    llmcb_op *op = run_new(s->loop, LLMCB_RUN_CHAIN, "chain", &c);
    llmcb_code code;

    llmcb_run_end(llmcb_op_run(op), llmcb_text("done"));
    code = llmcb_op_wait(op);
    llmcb_op_free(op);
    return code;
}

static char log_line[512];
static unsigned log_lines;

static void log_told(void *user, const char *line)
{
    (void)user;
    log_lines++;
    snprintf(log_line, sizeof log_line, "%s", line);
}

TEST(jsonl_short_writes_and_interruptions)
{
    scene s;
    llmcb_handler *h;

    disk_init();
    scene_init(&s);
    scene_begin(&s);
    h = llmcb_jsonl_handler(s.loop, path, true);
    REQUIRE(h);
    disk.at_most = 7;
    disk.eintr = 3;
    CHECK_INT(one_run(&s, h), LLMCB_OK);
    CHECK_INT(json_lines(read_file(path)), 2);
    CHECK_INT(disk.eintr, 0);
    llmcb_handler_free(h);
    scene_close(&s);
    disk_close();
}

/* What came before a full disk stays. A line may be cut, and so nothing
 * follows it: no event is hidden in the middle of another. */
TEST(jsonl_a_full_disk)
{
    long room;

    for (room = 0; room < 270; room += 37) {
        scene s;
        llmcb_handler *h;
        char *cut;
        size_t len;

        disk_init();
        scene_init(&s);
        s.ld.log = log_told;
        log_lines = 0;
        scene_begin(&s);
        h = llmcb_jsonl_handler(s.loop, path, true);
        REQUIRE(h);
        disk.room = room;
        CHECK_INT(one_run(&s, h), LLMCB_OK);
        CHECK_INT(log_lines, 1); /* told once */
        CHECK(strstr(log_line, "jsonl"));
        disk.room = -1;
        CHECK_INT(one_run(&s, h), LLMCB_OK);
        CHECK_INT(log_lines, 1);
        len = strlen(read_file(path));
        CHECK_INT(len, room);
        cut = strrchr(file_text, '\n');
        *(cut ? cut + 1 : file_text) = '\0';
        CHECK(json_lines(file_text) >= 0);
        llmcb_handler_free(h);
        h = llmcb_jsonl_handler(s.loop, path, true);
        REQUIRE(h);
        h->flags |= LLMCB_RAISE;
        disk.room = 0;
        CHECK_INT(one_run(&s, h), LLMCB_EHANDLER);
        llmcb_handler_free(h);
        scene_close(&s);
        disk_close();
    }
}

TEST(jsonl_refuses_links_and_bad_paths)
{
    scene s;
    char link[160];

    disk_init();
    scene_init(&s);
    scene_begin(&s);
    snprintf(link, sizeof link, "%s/link", dir);
    fclose(fopen(path, "w"));
    CHECK_INT(symlink(path, link), 0);
    errno = 0;
    CHECK(!llmcb_jsonl_handler(s.loop, link, true));
    CHECK_INT(errno, ELOOP);
    CHECK(!llmcb_file_handler(s.loop, link));
    CHECK_INT(errno, ELOOP);
    unlink(link);
    CHECK(!llmcb_jsonl_handler(s.loop, "/nonexistent/x", true));
    CHECK_INT(errno, ENOENT);
    CHECK(!llmcb_jsonl_handler(s.loop, NULL, true));
    CHECK(!llmcb_jsonl_handler(NULL, path, true));
    errno = 0; /* what is no file is refused, too, and errno says so */
    CHECK(!llmcb_jsonl_handler(s.loop, "/dev/null", true));
    CHECK(errno != 0);
    errno = 0;
    CHECK(!llmcb_file_handler(s.loop, "/dev/null"));
    CHECK(errno != 0);
    CHECK(!llmcb_file_handler(s.loop, "/nonexistent/x"));
    CHECK_INT(errno, ENOENT);
    CHECK(!llmcb_file_handler(s.loop, NULL));
    CHECK(!llmcb_file_handler(NULL, path));
    CHECK(!llmcb_token_handler(s.loop, NULL, false));
    CHECK(!llmcb_token_handler(NULL, stdout, false));
    CHECK(!llmcb_tree_handler(s.loop, NULL));
    CHECK(!llmcb_usage_handler(NULL));
    CHECK(!llmcb_collector(NULL));
    CHECK(!llmcb_timing_handler(NULL));
    llmcb_handler_free(NULL);
    scene_close(&s);
    disk_close();
}

static void *errno_resize(void *user, void *ptr, size_t old, size_t size)
{
    void *p = heap_resize(user, ptr, old, size);

    if (!size) errno = 0;
    return p;
}

/* Why a file was not opened is not lost when memory is given back. */
TEST(file_errno_is_of_the_open)
{
    static const struct {
        const char *path;
        int want;
    } rows[] = { { "/nonexistent/x", ENOENT }, { "/tmp", EISDIR } };
    scene s;
    size_t i;

    scene_init(&s);
    s.ld.allocator.resize = errno_resize;
    scene_begin(&s);
    for (i = 0; i < sizeof rows / sizeof *rows; i++) {
        errno = 0;
        CHECK(!llmcb_jsonl_handler(s.loop, rows[i].path, false));
        CHECK_INT(errno, rows[i].want);
        errno = 0;
        CHECK(!llmcb_file_handler(s.loop, rows[i].path));
        CHECK_INT(errno, rows[i].want);
    }
    scene_close(&s);
}

/* A line for which there was no memory is missing; the next is there. */
TEST(jsonl_without_memory_for_a_line)
{
    scene s;
    llmcb_handler *h;
    llmcb_event ev;
    llmcb_run run;
    llmcb_data data;

    disk_init();
    scene_init(&s);
    scene_begin(&s);
    h = llmcb_jsonl_handler(s.loop, path, true);
    REQUIRE(h);
    memset(&ev, 0, sizeof ev);
    memset(&run, 0, sizeof run);
    ev.kind = LLMCB_TEXT;
    ev.run = &run;
    ev.data = &data;
    data.name = llmcb_text("");
    data.text = llmcb_text("said");
    s.heap.fail_at = s.heap.calls + 1;
    CHECK(h->sync.on_text(h, &ev) != 0);
    s.heap.fail_at = 0;
    CHECK_INT(h->sync.on_text(h, &ev), 0);
    CHECK_INT(json_lines(read_file(path)), 1);
    llmcb_handler_free(h);
    scene_close(&s);
    disk_close();
}

TEST(jsonl_appends)
{
    scene s;
    llmcb_handler *h;
    int i;

    disk_init();
    scene_init(&s);
    scene_begin(&s);
    for (i = 0; i < 3; i++) {
        h = llmcb_jsonl_handler(s.loop, path, false);
        REQUIRE(h);
        one_run(&s, h);
        llmcb_handler_free(h);
    }
    CHECK_INT(json_lines(read_file(path)), 6);
    scene_close(&s);
    disk_close();
}

TEST(file_for_people)
{
    scene s;
    llmcb_handler *h;
    struct stat st;
    int i;

    disk_init();
    umask(0);
    for (i = 0; i < 2; i++) {
        scene_init(&s);
        all_tapes(&s);
        scene_begin(&s);
        h = llmcb_file_handler(s.loop, path);
        REQUIRE(h);
        all_events(&s, &h, 1, NULL, true);
        llmcb_handler_free(h);
        scene_close(&s);
    }
    umask(022);
    CHECK_INT(stat(path, &st), 0);
    CHECK_INT(st.st_mode & 0777, 0600);
    read_file(path);
    CHECK_INT(count_of(file_text, "> Entering Root \"chain\""), 2);
    CHECK_INT(count_of(file_text, "> Finished Root \"chain\""), 2);
    CHECK_INT(count_of(file_text, "Action: adds {\"a\":"), 2);
    CHECK_INT(count_of(file_text, "adds: canary-tool-42\n"), 2);
    CHECK_INT(count_of(file_text, "fails: no such city\n"), 2);
    CHECK_INT(count_of(file_text, "loses: the index is gone\n"), 2);
    CHECK_INT(count_of(file_text, "canary-text\n"), 2);
    CHECK_INT(count_of(file_text, "canary-said\n"), 2);
    CHECK(!strstr(file_text, KEY));
    disk_close();
}

TEST(file_escapes_control_characters)
{
    scene s;
    llmcb_handler *h;
    llmcb_config c;
    llmcb_op *op;

    disk_init();
    scene_init(&s);
    scene_begin(&s);
    h = llmcb_file_handler(s.loop, path);
    REQUIRE(h);
    c = config_of(&h, 1);
    op = run_new(s.loop, LLMCB_RUN_CHAIN, "c\033[2J", &c);
    llmcb_loop_run_once(s.loop, 0);
    llmcb_loop_run_once(s.loop, 0);
    while (llmcb_run_text(llmcb_op_run(op), llmcb_text("\302\233x\r")) ==
           LLMCB_ESTATE)
        llmcb_loop_run_once(s.loop, 0);
    llmcb_run_end(llmcb_op_run(op), llmcb_text(""));
    llmcb_op_wait(op);
    llmcb_op_free(op);
    CHECK_STR(read_file(path), "> Entering c\\x1b[2J\n\\u009bx\\x0d\n"
                               "> Finished c\\x1b[2J\n");
    llmcb_handler_free(h);
    scene_close(&s);
    disk_close();
}

/* A disk that has room again is written to again, without a complaint. */
TEST(file_recovers)
{
    scene s;
    llmcb_handler *h;
    struct rlimit was, none;

    disk_init();
    scene_init(&s);
    s.ld.log = log_told;
    log_lines = 0;
    scene_begin(&s);
    h = llmcb_file_handler(s.loop, path);
    REQUIRE(h);
    CHECK_INT(one_run(&s, h), LLMCB_OK);
    CHECK_INT(log_lines, 0);
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &was);
    none = was;
    none.rlim_cur = 0;
    setrlimit(RLIMIT_FSIZE, &none);
    CHECK_INT(one_run(&s, h), LLMCB_OK);
    setrlimit(RLIMIT_FSIZE, &was);
    CHECK(log_lines > 0);
    log_lines = 0;
    CHECK_INT(one_run(&s, h), LLMCB_OK);
    CHECK_INT(log_lines, 0);
    read_file(path);
    CHECK(strstr(file_text, "> Entering chain\n> Finished chain\n"));
    llmcb_handler_free(h);
    scene_close(&s);
    disk_close();
}

/* ---- trees ------------------------------------------------------------------- */

typedef struct grove {
    scene s;
    page p;
    llmcb_handler *tree;
    llmcb_config config;
} grove;

static void grove_open(grove *g)
{
    scene_init(&g->s);
    page_open(&g->p);
    scene_begin(&g->s);
    g->tree = llmcb_tree_handler(g->s.loop, g->p.f);
    g->config = config_of(&g->tree, 1);
}

static size_t records_of(llmcb_handler *h)
{
    return ((llmcbi_kit *)(void *)h)->n_records;
}

static void grove_close(grove *g)
{
    if (records_of(g->tree)) TEST_FAIL("the tree is not empty afterwards");
    llmcb_handler_free(g->tree);
    scene_close(&g->s);
    page_close(&g->p);
}

static void settle(llmcb_loop *loop, llmcb_op *op)
{
    llmcb_op_wait(op);
    llmcb_op_free(op);
    llmcb_loop_run_once(loop, 0);
}

/* Turns until the start of a run has been told. */
static llmcb_op *begun(llmcb_loop *loop, llmcb_op *op)
{
    while (op && ((llmcbi_run *)(void *)llmcb_op_run(op))->slowest < 1)
        llmcb_loop_run_once(loop, 0);
    return op;
}

TEST(tree_with_durations)
{
    grove g;
    llmcb_op *root, *a, *b, *c;

    grove_open(&g);
    root = begun(g.s.loop, run_new(g.s.loop, LLMCB_RUN_CHAIN, "root",
                                   &g.config));
    llmcb_clock_advance(g.s.loop, 5);
    a = begun(g.s.loop, run_in(g.s.loop, root, LLMCB_RUN_TOOL, "a\033"));
    b = begun(g.s.loop, run_in(g.s.loop, root, LLMCB_RUN_RETRIEVER, "b"));
    c = begun(g.s.loop, run_in(g.s.loop, b, LLMCB_RUN_CHAIN, "c"));
    llmcb_clock_advance(g.s.loop, 994);
    llmcb_run_end(llmcb_op_run(c), llmcb_text("x"));
    settle(g.s.loop, c);
    llmcb_clock_advance(g.s.loop, 6);
    llmcb_run_end(llmcb_op_run(b), llmcb_text("x"));
    settle(g.s.loop, b);
    CHECK_STR(page_text(&g.p), "");
    llmcb_clock_advance(g.s.loop, 60000);
    llmcb_run_end(llmcb_op_run(a), llmcb_text("x"));
    settle(g.s.loop, a);
    llmcb_run_end(llmcb_op_run(root), llmcb_text("x"));
    settle(g.s.loop, root);
    CHECK_STR(page_text(&g.p), "root  61.0 s\n"
                               "|-- a\\x1b  61.0 s\n"
                               "`-- b  1.0 s\n"
                               "    `-- c  994 ms\n");
    grove_close(&g);
}

TEST(tree_deep_with_branches)
{
    grove g;
    llmcb_op *root, *mid, *low, *x;

    grove_open(&g);
    root = begun(g.s.loop, run_new(g.s.loop, LLMCB_RUN_CHAIN, "root",
                                   &g.config));
    mid = begun(g.s.loop, run_in(g.s.loop, root, LLMCB_RUN_CHAIN, "mid"));
    low = begun(g.s.loop, run_in(g.s.loop, mid, LLMCB_RUN_CHAIN, "low"));
    x = begun(g.s.loop, run_in(g.s.loop, low, LLMCB_RUN_CHAIN, "x"));
    llmcb_run_end(llmcb_op_run(x), llmcb_text(""));
    settle(g.s.loop, x);
    x = begun(g.s.loop, run_in(g.s.loop, root, LLMCB_RUN_CHAIN, "late"));
    llmcb_run_end(llmcb_op_run(x), llmcb_text(""));
    settle(g.s.loop, x);
    x = begun(g.s.loop, run_in(g.s.loop, low, LLMCB_RUN_CHAIN, "y"));
    llmcb_run_end(llmcb_op_run(x), llmcb_text(""));
    settle(g.s.loop, x);
    x = begun(g.s.loop, run_in(g.s.loop, mid, LLMCB_RUN_CHAIN, "low2"));
    llmcb_run_end(llmcb_op_run(x), llmcb_text(""));
    settle(g.s.loop, x);
    llmcb_run_end(llmcb_op_run(low), llmcb_text(""));
    settle(g.s.loop, low);
    llmcb_run_end(llmcb_op_run(mid), llmcb_text(""));
    settle(g.s.loop, mid);
    llmcb_run_end(llmcb_op_run(root), llmcb_text(""));
    settle(g.s.loop, root);
    CHECK_STR(page_text(&g.p), "root  0 ms\n"
                               "|-- mid  0 ms\n"
                               "|   |-- low  0 ms\n"
                               "|   |   |-- x  0 ms\n"
                               "|   |   `-- y  0 ms\n"
                               "|   `-- low2  0 ms\n"
                               "`-- late  0 ms\n");
    grove_close(&g);
}

/* Deeper than the lines on the left are drawn. */
TEST(tree_forty_deep)
{
    grove g;
    llmcb_op *ops[40];
    size_t i;

    grove_open(&g);
    for (i = 0; i < 40; i++)
        ops[i] = begun(g.s.loop,
                       i ? run_in(g.s.loop, ops[i - 1], LLMCB_RUN_CHAIN, "r")
                         : run_new(g.s.loop, LLMCB_RUN_CHAIN, "r", &g.config));
    while (i--) {
        llmcb_run_end(llmcb_op_run(ops[i]), llmcb_text(""));
        settle(g.s.loop, ops[i]);
    }
    CHECK_INT(count_of(page_text(&g.p), "\n"), 40);
    CHECK_INT(count_of(g.p.text, "`-- r"), 39);
    grove_close(&g);
}

TEST(tree_two_roots_interleaved)
{
    grove g;
    llmcb_op *r1, *r2, *a, *b;

    grove_open(&g);
    r1 = begun(g.s.loop, run_new(g.s.loop, LLMCB_RUN_CHAIN, "one", &g.config));
    r2 = begun(g.s.loop, run_new(g.s.loop, LLMCB_RUN_CHAIN, "two", &g.config));
    a = begun(g.s.loop, run_in(g.s.loop, r1, LLMCB_RUN_TOOL, "a"));
    b = begun(g.s.loop, run_in(g.s.loop, r2, LLMCB_RUN_TOOL, "b"));
    llmcb_run_end(llmcb_op_run(a), llmcb_text(""));
    settle(g.s.loop, a);
    llmcb_run_end(llmcb_op_run(r1), llmcb_text(""));
    settle(g.s.loop, r1);
    CHECK_STR(page_text(&g.p), "one  0 ms\n`-- a  0 ms\n");
    CHECK_INT(records_of(g.tree), 2);
    a = begun(g.s.loop, run_in(g.s.loop, r2, LLMCB_RUN_TOOL, "c"));
    llmcb_run_end(llmcb_op_run(b), llmcb_text(""));
    settle(g.s.loop, b);
    llmcb_run_end(llmcb_op_run(a), llmcb_text(""));
    settle(g.s.loop, a);
    llmcb_run_end(llmcb_op_run(r2), llmcb_text(""));
    settle(g.s.loop, r2);
    CHECK_STR(page_text(&g.p), "one  0 ms\n`-- a  0 ms\n"
                               "two  0 ms\n|-- b  0 ms\n`-- c  0 ms\n");
    grove_close(&g);
}

#define ID_A "11111111-1111-4111-8111-111111111111"
#define ID_B "22222222-2222-4222-8222-222222222222"

static llmcb_op *run_id(grove *g, const char *name, const char *id,
                        const char *parent)
{
    llmcb_config c = g->config;

    c.run_id = id;
    c.parent_id = parent;
    return begun(g->s.loop, run_new(g->s.loop, LLMCB_RUN_CHAIN, name, &c));
}

static void finish(grove *g, llmcb_op *op)
{
    llmcb_run_end(llmcb_op_run(op), llmcb_text(""));
    settle(g->s.loop, op);
}

/* The parent is somebody whom the handler does not know. */
TEST(tree_orphans_are_roots)
{
    grove g;
    llmcb_op *a, *b;

    grove_open(&g);
    a = run_id(&g, "orphan", NULL, ID_A);
    b = begun(g.s.loop, run_in(g.s.loop, a, LLMCB_RUN_TOOL, "b"));
    finish(&g, b);
    finish(&g, a);
    CHECK_STR(page_text(&g.p), "orphan  0 ms\n`-- b  0 ms\n");
    grove_close(&g);
}

/* The parent is told of after its child, as a program may choose ids. */
TEST(tree_the_parent_starts_late)
{
    grove g;
    llmcb_op *child, *parent;

    grove_open(&g);
    child = run_id(&g, "child", NULL, ID_A);
    parent = run_id(&g, "parent", ID_A, NULL);
    finish(&g, child);
    finish(&g, parent);
    CHECK_STR(page_text(&g.p), "child  0 ms\nparent  0 ms\n");
    grove_close(&g);
}

/* Ids that the program has chosen badly must not hang or stay. */
TEST(tree_a_run_is_its_own_parent)
{
    grove g;
    llmcb_op *a, *b;

    grove_open(&g);
    b = run_id(&g, "other", NULL, NULL);
    a = run_id(&g, "self", ID_A, ID_A);
    finish(&g, b);
    finish(&g, a);
    CHECK(strstr(page_text(&g.p), "self  0 ms\n"));
    grove_close(&g);
}

TEST(tree_two_runs_are_each_others_parents)
{
    grove g;
    llmcb_op *a, *b, *c;

    grove_open(&g);
    c = run_id(&g, "other", NULL, NULL);
    a = run_id(&g, "a", ID_A, ID_B);
    b = run_id(&g, "b", ID_B, ID_A);
    finish(&g, c);
    CHECK(strstr(page_text(&g.p), "other  0 ms\n"));
    finish(&g, a);
    finish(&g, b);
    CHECK(strstr(page_text(&g.p), "a  0 ms\n`-- b  not finished\n"));
    grove_close(&g);
}

TEST(tree_the_same_id_twice)
{
    grove g;
    llmcb_op *a, *b;

    grove_open(&g);
    a = run_id(&g, "a", ID_A, NULL);
    b = run_id(&g, "b", ID_A, NULL);
    finish(&g, a);
    finish(&g, b);
    CHECK_INT(count_of(page_text(&g.p), "\n"), 2);
    grove_close(&g);
}

TEST(collector_the_same_id_twice)
{
    grove g;
    llmcb_handler *h;
    const llmcb_run_record *r;
    llmcb_op *a, *b;
    size_t n;

    grove_open(&g);
    h = llmcb_collector(g.s.loop);
    llmcb_loop_hook(g.s.loop, h);
    a = run_id(&g, "a", ID_A, ID_A);
    b = run_id(&g, "b", ID_A, ID_A);
    finish(&g, b);
    finish(&g, a);
    r = llmcb_collector_runs(h, &n);
    CHECK_INT(n, 2);
    CHECK(n == 2 && r[0].finished && r[1].finished);
    llmcb_loop_unhook(g.s.loop, h);
    llmcb_handler_free(h);
    CHECK_INT(count_of(page_text(&g.p), "\n"), 2);
    grove_close(&g);
}

TEST(tree_models_errors_and_usage)
{
    scene s;
    page p;
    llmcb_handler *h;

    scene_init(&s);
    page_open(&p);
    scene_tape(&s, OK_HEAD, "a|b|$|" USED("m", "3", "4") "|[DONE]", 10,
               LLMCB_REPLAY_KEEP);
    tape_raw(&s, FAIL_HEAD("400"), 7);
    scene_begin(&s);
    h = llmcb_tree_handler(s.loop, p.f);
    CHECK_INT(asked(s.chat, "hi", &h, 1), LLMCB_OK);
    CHECK_INT(asked(s.chat, "hi", &h, 1), LLMCB_EHTTP);
    CHECK_STR(page_text(&p), "ChatOpenAI  50 ms, 3 + 4 tokens\n"
                             "ChatOpenAI  7 ms  LLMCB_EHTTP\n");
    CHECK_INT(records_of(h), 0);
    llmcb_handler_free(h);
    scene_close(&s);
    page_close(&p);
}

typedef struct nap {
    int64_t ms;
} nap;

static llmcb_step nap_body(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, ((nap *)t->self)->ms));
    LLMCB_END(t);
}

TEST(tree_tools_in_parallel)
{
    grove g;
    nap naps[3] = { { 300 }, { 100 }, { 200 } };
    const char *names[] = { "slow", "quick", "middling" };
    llmcb_op *root, *ops[3];
    int i;

    grove_open(&g);
    root = begun(g.s.loop, run_new(g.s.loop, LLMCB_RUN_CHAIN, "root",
                                   &g.config));
    for (i = 0; i < 3; i++) {
        llmcb_config c = llmcb_run_child(llmcb_op_run(root), NULL);
        llmcb_run_desc d;
        memset(&d, 0, sizeof d);
        d.kind = LLMCB_RUN_TOOL;
        d.name = names[i];
        d.body = nap_body;
        d.self = &naps[i];
        ops[i] = llmcb_run_start(g.s.loop, &d, &c);
    }
    llmcb_run_end(llmcb_op_run(root), llmcb_text(""));
    settle(g.s.loop, root);
    for (i = 0; i < 3; i++)
        settle(g.s.loop, ops[i]);
    CHECK_STR(page_text(&g.p), "root  300 ms\n|-- slow  300 ms\n"
                               "|-- quick  100 ms\n`-- middling  200 ms\n");
    grove_close(&g);
}

TEST(case_103_fifty_roots_leave_nothing)
{
    grove g;
    llmcb_op *roots[50], *kids[50];
    llmcb_handler *collector, *timing;
    size_t blocks, i, n;

    grove_open(&g);
    collector = llmcb_collector(g.s.loop);
    timing = llmcb_timing_handler(g.s.loop);
    blocks = 0;
    for (n = 0; n < 3; n++) {
        llmcb_handler *all[3];
        llmcb_config c;
        all[0] = g.tree;
        all[1] = collector;
        all[2] = timing;
        c = config_of(all, 3);
        for (i = 0; i < 50; i++)
            roots[i] = begun(g.s.loop, run_new(g.s.loop, LLMCB_RUN_CHAIN,
                                               "root", &c));
        for (i = 0; i < 50; i++)
            kids[i] = begun(g.s.loop, run_in(g.s.loop, roots[i],
                                             LLMCB_RUN_TOOL, "kid"));
        for (i = 0; i < 50; i++) {
            llmcb_run_end(llmcb_op_run(roots[i]), llmcb_text(""));
            if (i % 3 == 1) llmcb_op_cancel(roots[i]);
            if (i % 3 == 2) {
                llmcb_op_free(roots[i]); /* cancelled and detached */
                roots[i] = NULL;
            }
        }
        for (i = 0; i < 50; i++) {
            settle(g.s.loop, roots[i]);
            settle(g.s.loop, kids[i]);
        }
        llmcb_loop_run(g.s.loop);
        CHECK_INT(records_of(g.tree), 0);
        CHECK_INT(records_of(collector), 100);
        llmcb_collector_clear(collector);
        CHECK_INT(records_of(collector), 0);
        CHECK(!((llmcbi_kit *)(void *)timing)->paces);
        if (n) CHECK_INT(g.s.heap.blocks, blocks);
        blocks = g.s.heap.blocks;
    }
    CHECK_INT(count_of(page_text(&g.p), "root"), 150);
    CHECK_INT(count_of(g.p.text, "kid"), 150);
    CHECK_INT(count_of(g.p.text, "not finished"), 0);
    llmcb_handler_free(collector);
    llmcb_handler_free(timing);
    grove_close(&g);
}

/* ---- usage --------------------------------------------------------------------- */

static int64_t total_of(llmcb_handler *h, const char *model)
{
    return llmcb_usage_of(h, model).total_tokens;
}

TEST(usage_by_the_model_that_served)
{
    scene s;
    llmcb_handler *h;
    llmcb_usage u;

    scene_init(&s);
    scene_tape(&s, OK_HEAD,
               "a|$|{\"model\":\"m-1\",\"choices\":[],\"usage\":{"
               "\"prompt_tokens\":10,\"completion_tokens\":20,"
               "\"total_tokens\":31,\"prompt_tokens_details\":{"
               "\"cached_tokens\":4},\"completion_tokens_details\":{"
               "\"reasoning_tokens\":5}}}|[DONE]",
               0, LLMCB_REPLAY_KEEP);
    scene_tape(&s, OK_HEAD, "a|$|" USED("m-2", "1", "2") "|[DONE]", 0,
               LLMCB_REPLAY_KEEP);
    scene_tape(&s, OK_HEAD, "{\"model\":\"m-2\",\"choices\":[]}|a|$|[DONE]", 0,
               LLMCB_REPLAY_KEEP);
    tape_raw(&s, FAIL_HEAD("400"), 0);
    scene_begin(&s);
    h = llmcb_usage_handler(s.loop);
    CHECK(!llmcb_usage_of(h, NULL).known);
    CHECK(!llmcb_usage_model(h, 0));
    asked(s.chat, "hi", &h, 1);
    u = llmcb_usage_of(h, "m-1");
    CHECK(u.known);
    CHECK_INT(u.input_tokens, 10);
    CHECK_INT(u.output_tokens, 20);
    CHECK_INT(u.total_tokens, 31);
    CHECK_INT(u.cached_tokens, 4);
    CHECK_INT(u.reasoning_tokens, 5);
    asked(s.chat, "hi", &h, 1);
    CHECK_STR(llmcb_usage_model(h, 0), "m-1");
    CHECK_STR(llmcb_usage_model(h, 1), "m-2");
    CHECK(!llmcb_usage_model(h, 2));
    u = llmcb_usage_of(h, NULL);
    CHECK(u.known);
    CHECK_INT(u.input_tokens, 11);
    CHECK_INT(u.output_tokens, 22);
    CHECK_INT(u.total_tokens, 43);
    CHECK_INT(u.cached_tokens, 4);
    asked(s.chat, "hi", &h, 1); /* which does not say */
    CHECK(!llmcb_usage_of(h, "m-2").known);
    CHECK_INT(total_of(h, "m-2"), 12);
    CHECK(llmcb_usage_of(h, "m-1").known);
    CHECK(!llmcb_usage_of(h, NULL).known);
    CHECK_INT(total_of(h, NULL), 43);
    CHECK_INT(asked(s.chat, "hi", &h, 1), LLMCB_EHTTP); /* no answer */
    CHECK(!llmcb_usage_model(h, 2));
    CHECK_INT(total_of(h, "none"), 0);
    CHECK(!llmcb_usage_of(h, "none").known);
    CHECK_INT(total_of(NULL, NULL), 0);
    CHECK(!llmcb_usage_model(NULL, 0));
    llmcb_handler_free(h);
    scene_close(&s);
}

#define LOOPS 8
#define CALLS 25
typedef struct caller {
    pthread_t thread;
    llmcb_handler *usage;
    llmcb_handler *others[4];
    int i;
    llmcb_code code;
} caller;

/* A loop of its own, with recordings of two models in turn. */
static void *caller_main(void *arg)
{
    caller *c = (caller *)arg;
    llmcb_loop_desc ld;
    llmcb_replay_desc rd;
    llmcb_recording tapes[CALLS];
    llmcb_chat_desc cd;
    llmcb_handler *all[5];
    llmcb_loop *loop;
    llmcb_chat *chat;
    char odd[600], even[600];
    int i;

    snprintf(odd, sizeof odd, OK_HEAD "data: " USED("odd", "3", "4") "\n\n"
                                      "data: [DONE]\n\n");
    snprintf(even, sizeof even, OK_HEAD "data: " USED("even", "1", "2") "\n\n"
                                        "data: [DONE]\n\n");
    memset(&ld, 0, sizeof ld);
    memset(&rd, 0, sizeof rd);
    memset(&cd, 0, sizeof cd);
    memset(tapes, 0, sizeof tapes);
    ld.virtual_clock = true;
    loop = llmcb_loop_new(&ld);
    for (i = 0; i < CALLS; i++) {
        tapes[i].bytes = (i + c->i) % 2 ? odd : even;
        tapes[i].len = strlen(tapes[i].bytes);
    }
    rd.recordings = tapes;
    rd.n_recordings = CALLS;
    cd.transport = llmcb_replay_new(loop, &rd);
    cd.base_url = "http://localhost/v1";
    cd.api_key = "";
    cd.streaming = true;
    chat = llmcb_chat_new(loop, &cd);
    all[0] = c->usage;
    memcpy(all + 1, c->others, sizeof c->others);
    for (i = 0; i < CALLS && c->code == LLMCB_OK; i++) {
        c->code = asked(chat, "hi", all, 5);
        if (llmcb_usage_of(c->usage, NULL).total_tokens < 12) c->code = -99;
    }
    llmcb_chat_free(chat);
    if (llmcb_loop_free(loop) != LLMCB_OK) c->code = LLMCB_ESTATE;
    return NULL;
}

/* One handler of each kind for eight loops in eight threads. */
TEST(case_105_usage_of_two_models_and_eight_threads)
{
    scene s;
    page p;
    caller callers[LOOPS];
    llmcb_handler *usage, *others[4];
    int i, odd = 0, even = 0, k;

    disk_init();
    scene_init(&s);
    page_open(&p);
    scene_begin(&s);
    usage = llmcb_usage_handler(s.loop);
    others[0] = llmcb_timing_handler(s.loop);
    others[1] = llmcb_tree_handler(s.loop, p.f);
    others[2] = llmcb_jsonl_handler(s.loop, path, true);
    others[3] = llmcb_collector(s.loop);
    memset(callers, 0, sizeof callers);
    for (i = 0; i < LOOPS; i++) {
        callers[i].i = i;
        callers[i].usage = usage;
        memcpy(callers[i].others, others, sizeof others);
        if (pthread_create(&callers[i].thread, NULL, caller_main, &callers[i]))
            abort();
        for (k = 0; k < CALLS; k++)
            (i + k) % 2 ? odd++ : even++;
    }
    for (i = 0; i < LOOPS; i++) {
        pthread_join(callers[i].thread, NULL);
        CHECK_INT(callers[i].code, LLMCB_OK);
    }
    CHECK_INT(llmcb_usage_of(usage, "odd").input_tokens, 3 * odd);
    CHECK_INT(llmcb_usage_of(usage, "odd").output_tokens, 4 * odd);
    CHECK_INT(llmcb_usage_of(usage, "odd").total_tokens, 34 * odd);
    CHECK_INT(llmcb_usage_of(usage, "even").input_tokens, even);
    CHECK_INT(llmcb_usage_of(usage, "even").total_tokens, 12 * even);
    CHECK_INT(total_of(usage, NULL), 34 * odd + 12 * even);
    CHECK(llmcb_usage_of(usage, NULL).known);
    CHECK_INT(llmcb_timing_of(others[0]).runs, LOOPS * CALLS);
    CHECK_INT(count_of(page_text(&p), "\n"), LOOPS * CALLS);
    CHECK_INT(records_of(others[1]), 0);
    CHECK_INT(records_of(others[3]), LOOPS * CALLS);
    CHECK(json_lines(read_file(path)) >= 2 * LOOPS * CALLS);
    llmcb_handler_free(usage);
    for (i = 0; i < 4; i++)
        llmcb_handler_free(others[i]);
    scene_close(&s);
    page_close(&p);
    disk_close();
}

/* ---- collector, timing ------------------------------------------------------------ */

TEST(collector_collects)
{
    scene s;
    llmcb_handler *h;
    const llmcb_run_record *r;
    llmcb_config c;
    llmcb_op *root, *tool;
    size_t n = 99;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a||b|$|" USED("m", "3", "4") "|[DONE]", 10,
               LLMCB_REPLAY_KEEP);
    tape_raw(&s, FAIL_HEAD("400"), 7);
    scene_begin(&s);
    h = llmcb_collector(s.loop);
    CHECK(!llmcb_collector_runs(NULL, &n));
    CHECK_INT(n, 0);
    llmcb_collector_clear(NULL);
    llmcb_collector_runs(h, &n);
    CHECK_INT(n, 0);
    asked(s.chat, "hi", &h, 1);
    asked(s.chat, "hi", &h, 1);
    c = config_of(&h, 1);
    root = begun(s.loop, run_new(s.loop, LLMCB_RUN_CHAIN, "root", &c));
    llmcb_clock_advance(s.loop, 5);
    tool = begun(s.loop, run_in(s.loop, root, LLMCB_RUN_TOOL, "tool"));
    llmcb_run_end(llmcb_op_run(tool), llmcb_text("brought"));
    settle(s.loop, tool);
    r = llmcb_collector_runs(h, &n);
    CHECK_INT(llmcb_collector_runs(h, NULL) == r, 1);
    CHECK_INT(n, 4);
    REQUIRE(n == 4);
    CHECK_STR(r[0].name, "ChatOpenAI");
    CHECK_INT(r[0].kind, LLMCB_CHAT_MODEL_START);
    CHECK_INT(r[0].started_ms, 0);
    CHECK_INT(r[0].finished_ms, 60);
    CHECK(r[0].finished && !r[0].cached);
    CHECK_INT(r[0].code, LLMCB_OK);
    CHECK_INT(r[0].tokens, 2); /* those with text */
    CHECK(r[0].usage.known);
    CHECK_INT(r[0].usage.input_tokens, 3);
    CHECK_STR(r[0].output, "ab");
    CHECK_STR(r[0].parent_id, "");
    CHECK_INT(strlen(r[0].id), 36);
    CHECK_INT(r[1].code, LLMCB_EHTTP);
    CHECK(r[1].finished && !r[1].usage.known);
    CHECK(strlen(r[1].output) > 5);
    CHECK_STR(r[2].name, "root");
    CHECK(!r[2].finished && !r[2].output);
    CHECK_STR(r[3].parent_id, r[2].id);
    CHECK_STR(r[3].output, "brought");
    CHECK_INT(r[3].kind, LLMCB_TOOL_START);
    CHECK_INT(r[3].started_ms, r[2].started_ms + 5);
    llmcb_collector_clear(h); /* all but root */
    r = llmcb_collector_runs(h, &n);
    CHECK_INT(n, 1);
    CHECK_STR(r[0].name, "root");
    llmcb_run_end(llmcb_op_run(root), llmcb_text("the end"));
    settle(s.loop, root);
    r = llmcb_collector_runs(h, &n);
    CHECK_STR(r[0].output, "the end");
    llmcb_handler_free(h);
    scene_close(&s);
}

/* Two threads with a loop each, whose runs one collector is told of, while a
 * third uses it in between its own. */
#define TOLD 300
#define AFTER 10

typedef struct teller {
    pthread_t thread;
    llmcb_handler *h;
    gate *done, *over; /* it has told TOLD runs; nothing is cleared any more */
    llmcb_code code;
} teller;

/* A run that brings its name. */
static llmcb_code tell(llmcb_loop *loop, const char *name,
                       const llmcb_config *config)
{
    llmcb_op *op = run_new(loop, LLMCB_RUN_CHAIN, name, config);
    llmcb_code code;

    llmcb_run_end(llmcb_op_run(op), llmcb_text(name));
    code = llmcb_op_wait(op);
    llmcb_op_free(op);
    return code;
}

static void *teller_main(void *arg)
{
    teller *t = (teller *)arg;
    llmcb_config c = config_of(&t->h, 1);
    llmcb_loop_desc ld;
    llmcb_loop *loop;
    llmcb_op *root;
    int i;

    memset(&ld, 0, sizeof ld);
    ld.virtual_clock = true;
    loop = llmcb_loop_new(&ld);
    root = begun(loop, run_new(loop, LLMCB_RUN_CHAIN, "root", &c));
    for (i = 0; i < TOLD && t->code == LLMCB_OK; i++)
        t->code = tell(loop, "between", &c);
    gate_let(t->done, 1);
    gate_pass(t->over);
    for (i = 0; i < AFTER && t->code == LLMCB_OK; i++)
        t->code = tell(loop, "after", &c);
    llmcb_run_end(llmcb_op_run(root), llmcb_text("root"));
    if (t->code == LLMCB_OK) t->code = llmcb_op_wait(root);
    llmcb_op_free(root);
    if (llmcb_loop_free(loop) != LLMCB_OK) t->code = LLMCB_ESTATE;
    return NULL;
}

static unsigned gate_may(gate *g)
{
    unsigned n;

    pthread_mutex_lock(&g->m);
    n = g->may;
    pthread_mutex_unlock(&g->m);
    return n;
}

static void collector_shared(bool clears)
{
    gate done = GATE, over = GATE;
    const llmcb_run_record *r;
    unsigned roots = 0, between = 0, after = 0, own = 0, told = 0;
    llmcb_config c;
    llmcb_handler *h;
    teller tellers[2];
    size_t i, n, least = 0;
    scene s;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_begin(&s);
    h = llmcb_collector(s.loop);
    c = config_of(&h, 1);
    memset(tellers, 0, sizeof tellers);
    for (i = 0; i < 2; i++) {
        tellers[i].h = h;
        tellers[i].done = &done;
        tellers[i].over = &over;
        if (pthread_create(&tellers[i].thread, NULL, teller_main, &tellers[i]))
            abort();
    }
    /* seldom asks whether they are done, since asking is a lock, too */
    while (told < 20 || gate_may(&done) < 2) {
        for (i = 0; i < 20; i++, told++) {
            CHECK_INT(tell(s.loop, "own", &c), LLMCB_OK);
            llmcb_collector_runs(h, &n);
            if (!clears && n <= least) TEST_FAIL("a run was forgotten");
            least = n;
            if (clears) llmcb_collector_clear(h);
        }
    }
    if (clears) llmcb_collector_clear(h); /* after all that is between */
    gate_let(&over, ALL);
    for (i = 0; i < 2; i++) {
        pthread_join(tellers[i].thread, NULL);
        CHECK_INT(tellers[i].code, LLMCB_OK);
    }
    r = llmcb_collector_runs(h, &n);
    for (i = 0; i < n; i++) {
        roots += strcmp(r[i].name, "root") == 0;
        between += strcmp(r[i].name, "between") == 0;
        after += strcmp(r[i].name, "after") == 0;
        own += strcmp(r[i].name, "own") == 0;
        CHECK(r[i].finished);
        CHECK_INT(r[i].code, LLMCB_OK);
        CHECK_STR(r[i].output, r[i].name);
        CHECK_INT(strlen(r[i].id), 36);
    }
    CHECK_INT(roots, 2); /* open at every clear */
    CHECK_INT(after, 2 * AFTER);
    if (clears) {
        CHECK_INT(own, 0);
        CHECK_INT(between, 0);
    } else {
        CHECK_INT(own, told);
        CHECK_INT(between, 2 * TOLD);
    }
    CHECK_INT(n, roots + between + after + own);
    llmcb_collector_clear(h);
    llmcb_collector_runs(h, &n);
    CHECK_INT(n, 0);
    llmcb_handler_free(h);
    scene_close(&s);
}

TEST(collector_is_read_while_other_loops_tell)
{
    collector_shared(false);
}

TEST(collector_is_cleared_while_other_loops_tell)
{
    collector_shared(true);
}

/* "Before or after the loop". */
TEST(handlers_go_after_their_loop)
{
    heap hp;
    llmcb_loop_desc d;
    llmcb_loop *loop;
    llmcb_handler *h[6];
    page p;
    size_t i;

    disk_init();
    page_open(&p);
    memset(&hp, 0, sizeof hp);
    pthread_mutex_init(&hp.m, NULL);
    memset(&d, 0, sizeof d);
    d.allocator.resize = heap_resize;
    d.allocator.user = &hp;
    loop = llmcb_loop_new(&d);
    h[0] = llmcb_usage_handler(loop);
    h[1] = llmcb_collector(loop);
    h[2] = llmcb_timing_handler(loop);
    h[3] = llmcb_jsonl_handler(loop, path, true);
    h[4] = llmcb_tree_handler(loop, p.f);
    h[5] = llmcb_token_handler(loop, p.f, false);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    for (i = 0; i < 6; i++)
        llmcb_handler_free(h[i]);
    CHECK_INT(hp.blocks, 0);
    CHECK(!hp.wrong);
    pthread_mutex_destroy(&hp.m);
    page_close(&p);
    disk_close();
}

TEST(timing_of_a_stream)
{
    scene s;
    llmcb_handler *h;
    llmcb_timing t;

    scene_init(&s);
    /* tokens with text at 10, 20, 50 ms; the rest is empty */
    scene_tape(&s, OK_HEAD, "a|b|||c|$|[DONE]", 10, LLMCB_REPLAY_KEEP);
    tape_raw(&s, FAIL_HEAD("400"), 7);
    scene_tape(&s, OK_HEAD, "a|||b|c" DONE, 10, LLMCB_REPLAY_KEEP);
    scene_begin(&s);
    h = llmcb_timing_handler(s.loop);
    t = llmcb_timing_of(h);
    CHECK_INT(t.runs, 0);
    CHECK_INT(t.first_token_ms, -1);
    asked(s.chat, "hi", &h, 1);
    t = llmcb_timing_of(h);
    CHECK_INT(t.runs, 1);
    CHECK_INT(t.tokens, 3);
    CHECK_INT(t.first_token_ms, 10);
    CHECK_INT(t.longest_gap_ms, 30);
    CHECK_INT(t.total_ms, 70);
    CHECK(t.tokens_per_second == 50.0);
    asked(s.chat, "hi", &h, 1);
    t = llmcb_timing_of(h);
    CHECK_INT(t.runs, 2);
    CHECK_INT(t.tokens, 0);
    CHECK_INT(t.first_token_ms, -1);
    CHECK_INT(t.total_ms, 7);
    CHECK(t.tokens_per_second == 0.0);
    asked(s.chat, "hi", &h, 1); /* the long gap comes first */
    CHECK_INT(llmcb_timing_of(h).longest_gap_ms, 30);
    CHECK_INT(llmcb_timing_of(NULL).runs, 0);
    llmcb_handler_free(h);
    scene_close(&s);
}

/* ---- the rate limiter -------------------------------------------------------------- */

/* A call's request: when it left, told by its own handler. */
typedef struct lane {
    scene s;
    llmcb_limiter *limiter;
    llmcb_chat *chat;
    llmcb_op *ops[64];
    int64_t left[64]; /* when requests left */
    size_t n;
} lane;

static lane *lane_here;

static llmcb_code lane_start(llmcb_transport *tr, llmcb_exchange *x,
                             const llmcb_request *q)
{
    if (lane_here && lane_here->n < 64)
        lane_here->left[lane_here->n++] = llmcb_loop_now(tr->loop);
    return spy_start(tr, x, q);
}

static void lane_open(lane *l, unsigned per_minute, unsigned burst)
{
    memset(l, 0, sizeof *l);
    scene_init(&l->s);
    scene_tape(&l->s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_begin(&l->s);
    l->s.spy.base.start = lane_start;
    lane_here = l;
    l->limiter = llmcb_limiter_new(l->s.loop, per_minute, burst);
    l->chat = chat_with(&l->s, l->limiter, NULL, NULL);
}

static void lane_call(lane *l, size_t i)
{
    l->ops[i] = ask_with(l->chat, "hi", NULL, 0);
}

/* Turns until so many wait; no further, as virtual time would jump. */
static void lane_queue(lane *l, size_t n)
{
    size_t turn, waiting = 0;

    for (turn = 0; turn < 100 && waiting < n; turn++) {
        const llmcbi_prompt *p = l->limiter->first;
        for (waiting = 0; p; p = p->next_limited) waiting++;
        if (waiting < n) llmcb_loop_run_once(l->s.loop, 0);
    }
    CHECK_INT(waiting, n);
}

static void lane_close(lane *l)
{
    size_t i;

    for (i = 0; i < 64; i++)
        llmcb_op_free(l->ops[i]);
    llmcb_chat_free(l->chat);
    llmcb_limiter_free(l->limiter);
    lane_here = NULL;
    scene_close(&l->s);
}

TEST(case_107_a_limiter_of_twenty_a_second)
{
    lane l;
    llmcb_cache *cache;
    llmcb_chat *chat;
    llmcb_op *op;

    lane_open(&l, 1200, 1);
    CHECK_INT(asked(l.chat, "hi", NULL, 0), LLMCB_OK);
    CHECK_INT(l.left[0], 50); /* it starts empty */
    CHECK_INT(asked(l.chat, "hi", NULL, 0), LLMCB_OK);
    CHECK_INT(l.left[1], 100);
    cache = llmcb_cache_new(l.s.loop, 0);
    chat = chat_with(&l.s, l.limiter, cache, NULL);
    CHECK_INT(asked(chat, "hi", NULL, 0), LLMCB_OK);
    CHECK_INT(l.left[2], 150);
    op = ask_with(chat, "hi", NULL, 0);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK(llmcb_op_result(op)->cached);
    CHECK_INT(llmcb_loop_now(l.s.loop), 150); /* no wait */
    llmcb_op_free(op);
    CHECK_INT(asked(l.chat, "hi", NULL, 0), LLMCB_OK);
    CHECK_INT(l.left[3], 200); /* and no token taken */
    CHECK_INT(l.n, 4);
    llmcb_chat_free(chat);
    llmcb_cache_free(cache);
    lane_close(&l);
}

TEST(limiter_first_come_first_served)
{
    lane l;
    book b;
    llmcb_handler *h = book_init(&b);
    size_t i;

    lane_open(&l, 600, 1);
    for (i = 0; i < 20; i++)
        l.ops[i] = ask_with(l.chat, "hi", &h, 1);
    CHECK_INT(llmcb_loop_run(l.s.loop), LLMCB_OK);
    CHECK_INT(l.n, 20);
    for (i = 0; i < 20; i++) {
        CHECK_INT(l.left[i], 100 * (int64_t)(i + 1));
        CHECK_INT(llmcb_op_run(l.ops[i])->finished_ms,
                  100 * (int64_t)(i + 1));
        CHECK_INT(llmcb_op_run(l.ops[i])->started_ms, 0);
    }
    lane_close(&l);
}

TEST(limiter_bursts)
{
    lane l;
    size_t i;

    lane_open(&l, 60, 5);
    llmcb_clock_advance(l.s.loop, 3500); /* three and a half */
    for (i = 0; i < 5; i++) lane_call(&l, i);
    llmcb_loop_run(l.s.loop);
    CHECK_INT(l.left[0], 3500);
    CHECK_INT(l.left[2], 3500);
    CHECK_INT(l.left[3], 4000);
    CHECK_INT(l.left[4], 5000);
    llmcb_clock_advance(l.s.loop, 1000000); /* no more than five */
    for (i = 5; i < 12; i++) lane_call(&l, i);
    llmcb_loop_run(l.s.loop);
    CHECK_INT(l.left[5], 1005000);
    CHECK_INT(l.left[9], 1005000);
    CHECK_INT(l.left[10], 1006000);
    CHECK_INT(l.left[11], 1007000);
    lane_close(&l);
}

TEST(limiter_one_does_not_pile_up)
{
    lane l;
    size_t i;

    lane_open(&l, 60, 0);
    llmcb_clock_advance(l.s.loop, 10500);
    for (i = 0; i < 3; i++) lane_call(&l, i);
    llmcb_loop_run(l.s.loop);
    CHECK_INT(l.left[0], 10500);
    CHECK_INT(l.left[1], 11500); /* the half was not kept beyond the brim */
    CHECK_INT(l.left[2], 12500);
    lane_close(&l);
}

/* Nothing is lost to rounding: 7 a minute is 7 a minute. */
TEST(limiter_odd_rates)
{
    lane l;
    size_t i;

    lane_open(&l, 7, 1);
    for (i = 0; i < 28; i++) lane_call(&l, i);
    llmcb_loop_run(l.s.loop);
    for (i = 0; i < 28; i++) {
        int64_t least = (60000 * (int64_t)(i + 1) + 6) / 7;
        CHECK_INT(l.left[i], least);
    }
    lane_close(&l);
}

TEST(limiter_more_than_one_in_a_millisecond)
{
    lane l;
    size_t i;

    lane_open(&l, 40000, 1); /* one and a half milliseconds each */
    for (i = 0; i < 60; i++) lane_call(&l, i);
    llmcb_loop_run(l.s.loop);
    for (i = 0; i < 60; i++) CHECK_INT(l.left[i], (3 * (int64_t)i + 4) / 2);
    lane_close(&l);
    lane_open(&l, 240000, 1);
    for (i = 0; i < 60; i++) lane_call(&l, i);
    llmcb_loop_run(l.s.loop);
    CHECK_INT(l.left[59], 15);
    lane_close(&l);
}

TEST(limiter_huge_and_tiny_rates)
{
    lane l;
    size_t i;

    lane_open(&l, UINT_MAX, UINT_MAX);
    CHECK(!llmcb_limiter_new(l.s.loop, 0, 1));
    CHECK(!llmcb_limiter_new(NULL, 1, 1));
    llmcb_limiter_free(NULL);
    for (i = 0; i < 30; i++) lane_call(&l, i);
    llmcb_loop_run(l.s.loop);
    CHECK_INT(l.left[29], 1);
    llmcb_clock_advance(l.s.loop, INT64_C(1) << 50);
    lane_call(&l, 30);
    llmcb_loop_run(l.s.loop);
    CHECK_INT(l.n, 31);
    lane_close(&l);
    lane_open(&l, 1, 1);
    for (i = 0; i < 3; i++) lane_call(&l, i);
    llmcb_loop_run(l.s.loop);
    CHECK_INT(l.left[0], 60000);
    CHECK_INT(l.left[2], 180000);
    lane_close(&l);
    lane_open(&l, 1, UINT_MAX);
    llmcb_clock_advance(l.s.loop, INT64_C(1) << 60);
    for (i = 0; i < 30; i++) lane_call(&l, i);
    llmcb_loop_run(l.s.loop);
    CHECK_INT(l.left[29], INT64_C(1) << 60);
    lane_close(&l);
}

/* Who leaves the queue takes no token, wherever it stood. */
TEST(limiter_a_cancel_gives_the_place_back)
{
    int who;

    for (who = 0; who < 4; who++) {
        lane l;
        size_t i;

        lane_open(&l, 60, 1);
        for (i = 0; i < 4; i++) lane_call(&l, i);
        lane_queue(&l, 4);
        llmcb_clock_advance(l.s.loop, 500);
        if (who & 1)
            llmcb_op_cancel(l.ops[who]);
        else {
            llmcb_op_free(l.ops[who]);
            l.ops[who] = NULL;
        }
        llmcb_loop_run(l.s.loop);
        CHECK_INT(l.n, 3);
        for (i = 0; i < 3; i++) CHECK_INT(l.left[i], 1000 * (int64_t)(i + 1));
        if (who & 1) CHECK_INT(llmcb_op_code(l.ops[who]), LLMCB_ECANCELLED);
        lane_close(&l);
    }
}

TEST(limiter_everybody_leaves_and_comes_back)
{
    lane l;
    size_t i;

    lane_open(&l, 60, 1);
    for (i = 0; i < 4; i++) lane_call(&l, i);
    lane_queue(&l, 4);
    for (i = 0; i < 4; i++) llmcb_op_cancel(l.ops[i]);
    for (i = 0; i < 4; i++)
        CHECK_INT(llmcb_op_wait(l.ops[i]), LLMCB_ECANCELLED);
    CHECK_INT(llmcb_loop_now(l.s.loop), 0);
    CHECK(!l.limiter->first);
    CHECK(!l.limiter->timer.place); /* nothing to wake up for */
    for (i = 4; i < 6; i++) lane_call(&l, i);
    llmcb_loop_run(l.s.loop);
    CHECK_INT(l.n, 2);
    CHECK_INT(l.left[0], 1000);
    CHECK_INT(l.left[1], 2000);
    lane_close(&l);
}

static void two_seconds(llmcb_chat_desc *d)
{
    d->total_ms = 2500;
}

/* The time limit of the whole runs in the queue too. */
TEST(limiter_total_ms_in_the_queue)
{
    lane l;
    llmcb_chat *chat;
    size_t i;

    lane_open(&l, 60, 1);
    chat = chat_with(&l.s, l.limiter, NULL, two_seconds);
    for (i = 0; i < 4; i++) l.ops[i] = ask_with(chat, "hi", NULL, 0);
    lane_call(&l, 4); /* of the other chat */
    llmcb_loop_run(l.s.loop);
    CHECK_INT(llmcb_op_code(l.ops[1]), LLMCB_OK);
    CHECK_INT(llmcb_op_code(l.ops[2]), LLMCB_ETIMEDOUT);
    CHECK_INT(llmcb_op_code(l.ops[3]), LLMCB_ETIMEDOUT);
    CHECK_INT(llmcb_op_error(l.ops[3])->detail, LLMCB_DETAIL_TOTAL);
    CHECK_INT(l.n, 3);
    CHECK_INT(l.left[2], 3000);
    llmcb_chat_free(chat);
    lane_close(&l);
}

TEST(limiter_freed_while_in_use)
{
    lane l;
    size_t i;

    lane_open(&l, 60, 1);
    for (i = 0; i < 3; i++) lane_call(&l, i);
    lane_queue(&l, 3);
    llmcb_limiter_free(l.limiter);
    l.limiter = NULL;
    llmcb_chat_free(l.chat); /* calls under way go on */
    l.chat = NULL;
    llmcb_loop_run(l.s.loop);
    CHECK_INT(l.n, 3);
    CHECK_INT(l.left[2], 3000);
    lane_close(&l);
}

/* The loop goes while they wait: one finish each. */
TEST(limiter_loop_freed_with_a_queue)
{
    lane l;
    book b;
    llmcb_handler *h = book_init(&b);
    size_t i;

    lane_open(&l, 1, 1);
    for (i = 0; i < 3; i++) l.ops[i] = ask_with(l.chat, "hi", &h, 1);
    lane_queue(&l, 3);
    llmcb_limiter_free(l.limiter);
    for (i = 0; i < 3; i++) {
        llmcb_op_free(l.ops[i]);
        l.ops[i] = NULL;
    }
    l.limiter = NULL;
    lane_close(&l);
    book_check(&b);
    CHECK_INT(b.n, 6);
}

TEST(limiter_shared_by_two_chats)
{
    lane l;
    llmcb_chat *other;
    size_t i;

    lane_open(&l, 600, 1);
    other = chat_with(&l.s, l.limiter, NULL, NULL);
    for (i = 0; i < 6; i++)
        l.ops[i] = ask_with(i % 2 ? other : l.chat, "hi", NULL, 0);
    llmcb_loop_run(l.s.loop);
    for (i = 0; i < 6; i++)
        CHECK_INT(llmcb_op_run(l.ops[i])->finished_ms, 100 * (int64_t)(i + 1));
    llmcb_chat_free(other);
    lane_close(&l);
}

TEST(limiter_of_another_loop_is_refused)
{
    lane l;
    scene t;
    llmcb_chat *chat;

    lane_open(&l, 600, 1);
    scene_init(&t);
    scene_begin(&t);
    chat = chat_with(&t, l.limiter, NULL, NULL);
    CHECK_INT(llmcb_chat_error(chat)->code, LLMCB_EINVAL);
    CHECK_INT(asked(chat, "hi", NULL, 0), LLMCB_EINVAL);
    llmcb_chat_free(chat);
    scene_close(&t);
    lane_close(&l);
}

TEST(cache_of_another_loop_is_refused)
{
    scene s, t;
    llmcb_cache *cache;
    llmcb_chat *chat;

    scene_init(&s);
    scene_begin(&s);
    cache = llmcb_cache_new(s.loop, 0);
    CHECK(!llmcb_cache_new(NULL, 0));
    llmcb_cache_free(NULL);
    scene_init(&t);
    scene_begin(&t);
    chat = chat_with(&t, NULL, cache, NULL);
    CHECK_INT(llmcb_chat_error(chat)->code, LLMCB_EINVAL);
    llmcb_chat_free(chat);
    scene_close(&t);
    llmcb_cache_free(cache);
    scene_close(&s);
}

/* 429, 503, an answer: one token. */
TEST(limiter_retries_take_none)
{
    scene s;
    llmcb_limiter *limiter;
    llmcb_chat *chat;
    book b;
    llmcb_handler *h = book_init(&b);
    int64_t first, now;

    scene_init(&s);
    tape_raw(&s, FAIL_HEAD("429"), 0);
    tape_raw(&s, FAIL_HEAD("503"), 0);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_begin(&s);
    limiter = llmcb_limiter_new(s.loop, 1, 1); /* one a minute */
    chat = chat_with(&s, limiter, NULL, NULL);
    CHECK_INT(asked(chat, "hi", &h, 1), LLMCB_OK);
    first = llmcb_loop_now(s.loop);
    CHECK(first > 60000 && first < 63000);
    CHECK_INT(s.spy.requests, 3);
    CHECK_INT(count_of(b.order, "retry ChatOpenAI"), 2);
    CHECK_INT(asked(chat, "hi", &h, 1), LLMCB_OK);
    now = llmcb_loop_now(s.loop);
    CHECK_INT(now, 120000);
    llmcb_chat_free(chat);
    llmcb_limiter_free(limiter);
    scene_close(&s);
}

/* Stops in the queue leave the handlers with one finish. */
TEST(case_068_cancel_in_the_limiter)
{
    lane l;
    book b;
    llmcb_handler *h = book_init(&b);

    lane_open(&l, 60, 1);
    l.ops[0] = ask_with(l.chat, "hi", &h, 1);
    lane_queue(&l, 1);
    llmcb_op_cancel(l.ops[0]);
    CHECK_INT(llmcb_op_wait(l.ops[0]), LLMCB_ECANCELLED);
    CHECK_STR(b.order, "chat_model_start ChatOpenAI; llm_error ChatOpenAI");
    CHECK_INT(l.n, 0);
    lane_close(&l);
}

/* A transport that cannot begin: everybody gets its turn all the same. */
static llmcb_code never_start(llmcb_transport *tr, llmcb_exchange *x,
                              const llmcb_request *q)
{
    (void)tr, (void)x, (void)q;
    return LLMCB_ESYS;
}

TEST(limiter_requests_that_cannot_begin)
{
    lane l;
    size_t i;

    lane_open(&l, 60, 3);
    l.s.spy.base.start = never_start;
    for (i = 0; i < 5; i++) lane_call(&l, i);
    llmcb_loop_run_once(l.s.loop, 0);
    llmcb_chat_free(l.chat);
    l.chat = NULL;
    llmcb_limiter_free(l.limiter);
    l.limiter = NULL;
    for (i = 0; i < 5; i++)
        CHECK_INT(llmcb_op_wait(l.ops[i]), LLMCB_ESYS);
    CHECK_INT(llmcb_loop_now(l.s.loop), 5000);
    lane_close(&l);
}

TEST(case_074_a_batch_of_twenty_through_a_limiter)
{
    lane l;
    llmcb_message m[20];
    llmcb_prompt prompts[20];
    llmcb_config c;
    llmcb_op *op;
    size_t i;

    lane_open(&l, 60000, 20);
    memset(m, 0, sizeof m);
    memset(&c, 0, sizeof c);
    c.max_concurrency = 4;
    for (i = 0; i < 20; i++) {
        m[i].content = "hi";
        prompts[i].messages = &m[i];
        prompts[i].n = 1;
    }
    op = llmcb_chat_batch(l.chat, prompts, 20, &c);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(l.n, 20);
    CHECK(l.s.spy.peak <= 4);
    for (i = 0; i < 20; i++) {
        CHECK_INT(l.left[i], (int64_t)i + 1); /* one a millisecond */
        CHECK_STR(llmcb_op_result_at(op, i)->generations[0].text.ptr, "a");
    }
    llmcb_op_free(op);
    lane_close(&l);
}

/* semantics.md 106: the queue of tokens is the stream. */
TEST(case_106_a_burst_before_the_consumer_comes)
{
    scene s;
    llmcb_op *op;
    const llmcb_chunk *chunk;
    char text[64] = "";
    int n = 0;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b|c|d|e|f" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_begin(&s);
    op = scene_stream(&s);
    for (n = 0; n < 50; n++) llmcb_loop_run_once(s.loop, 0);
    CHECK_INT(s.spy.open, 0); /* all of it is there */
    for (n = 0; llmcb_op_next(op, &chunk); n++)
        strcat(text, chunk->text.ptr);
    CHECK_INT(n, 7); /* and the finish */
    CHECK_STR(text, "abcdef");
    CHECK(!llmcb_op_next(op, &chunk));
    CHECK_INT(llmcb_op_code(op), LLMCB_OK);
    llmcb_op_free(op);
    scene_close(&s);
}

/* ---- the cache ------------------------------------------------------------------------ */

static bool same_str(llmcb_str a, llmcb_str b)
{
    return a.len == b.len && memcmp(a.ptr, b.ptr, a.len) == 0 &&
           b.ptr[b.len] == '\0';
}

/* Whether two results are the same but for `cached` and `sentinel`. */
static const char *results_differ(const llmcb_result *a, const llmcb_result *b)
{
    size_t i, k;

    if (a->complete != b->complete) return "complete";
    if (!same_str(a->model_name, b->model_name)) return "model_name";
    if (!same_str(a->id, b->id)) return "id";
    if (!same_str(a->system_fingerprint, b->system_fingerprint))
        return "system_fingerprint";
    if (a->usage.known != b->usage.known) return "usage.known";
    if (a->usage.input_tokens != b->usage.input_tokens ||
        a->usage.output_tokens != b->usage.output_tokens ||
        a->usage.total_tokens != b->usage.total_tokens ||
        a->usage.cached_tokens != b->usage.cached_tokens ||
        a->usage.reasoning_tokens != b->usage.reasoning_tokens)
        return "usage";
    if (a->n_generations != b->n_generations) return "n_generations";
    for (i = 0; i < a->n_generations; i++) {
        const llmcb_generation *x = &a->generations[i];
        const llmcb_generation *y = &b->generations[i];
        if (!same_str(x->text, y->text)) return "text";
        if (!same_str(x->refusal, y->refusal)) return "refusal";
        if (!same_str(x->reasoning, y->reasoning)) return "reasoning";
        if (!same_str(x->finish_reason, y->finish_reason))
            return "finish_reason";
        if (!same_str(x->logprobs, y->logprobs)) return "logprobs";
        if (x->n_tool_calls != y->n_tool_calls) return "n_tool_calls";
        for (k = 0; k < x->n_tool_calls; k++) {
            const llmcb_tool_call *p = &x->tool_calls[k];
            const llmcb_tool_call *q = &y->tool_calls[k];
            if (!same_str(p->id, q->id)) return "tool id";
            if (!same_str(p->name, q->name)) return "tool name";
            if (!same_str(p->arguments, q->arguments)) return "arguments";
            if (p->valid != q->valid) return "valid";
        }
    }
    return NULL;
}

static void not_streaming(llmcb_chat_desc *d)
{
    d->streaming = false;
}

static void three_choices(llmcb_chat_desc *d)
{
    d->n = 3;
}

/* Asks twice and compares; only one request may leave. */
static void cache_twice(const char *what, const char *pieces, const char *whole,
                        void (*more)(llmcb_chat_desc *))
{
    scene s;
    llmcb_cache *cache;
    llmcb_chat *chat;
    llmcb_op *a, *b;
    const char *differ;
    char *bytes = (char *)malloc(20000);

    if (!bytes) abort();
    scene_init(&s);
    if (whole) {
        snprintf(bytes, 20000, "%s%s", JSON_HEAD, whole);
        tape_raw(&s, bytes, 0);
    } else {
        scene_tape(&s, OK_HEAD, pieces, 3, LLMCB_REPLAY_KEEP);
    }
    tape_raw(&s, FAIL_HEAD("400"), 0);
    scene_begin(&s);
    cache = llmcb_cache_new(s.loop, 0);
    chat = chat_with(&s, NULL, cache, more);
    a = ask_with(chat, "hi", NULL, 0);
    b = NULL;
    if (llmcb_op_wait(a) != LLMCB_OK)
        TEST_FAIL("%s: %s", what, llmcb_op_error(a)->message);
    b = ask_with(chat, "hi", NULL, 0);
    if (llmcb_op_wait(b) != LLMCB_OK)
        TEST_FAIL("%s again: %s", what, llmcb_op_error(b)->message);
    differ = results_differ(llmcb_op_result(a), llmcb_op_result(b));
    if (differ) TEST_FAIL("%s: other %s", what, differ);
    CHECK(!llmcb_op_result(a)->cached);
    CHECK(llmcb_op_result(b)->cached);
    CHECK_INT(s.spy.requests, 1);
    llmcb_op_free(a);
    llmcb_op_free(b);
    llmcb_chat_free(chat);
    llmcb_cache_free(cache);
    scene_close(&s);
    free(bytes);
}

#define D0(members) \
    "{\"id\":\"i-1\",\"model\":\"m\",\"system_fingerprint\":\"fp\"," \
    "\"choices\":[{\"index\":0,\"delta\":{" members "}}]}"
#define DI(i, members, finish) \
    "{\"choices\":[{\"index\":" i ",\"delta\":{" members \
    "},\"finish_reason\":" finish "}]}"

TEST(cache_answers_come_back_equal)
{
    cache_twice("text", "Hel|lo" DONE, NULL, NULL);
    cache_twice("escapes", "q\\\"\\\\\\u0000\\n\\u001b\\ud83d\\ude00|\\u00e9"
                DONE, NULL, NULL);
    cache_twice("lone surrogate", "x\\ud83d|y" DONE, NULL, NULL);
    cache_twice("not UTF-8", "x\377|y\303" DONE, NULL, NULL);
    cache_twice("empty", "$|[DONE]", NULL, NULL);
    cache_twice("refusal", D0("\"refusal\":\"No\"") "|" D0("\"refusal\":\"!\"")
                DONE, NULL, NULL);
    cache_twice("reasoning", D0("\"reasoning_content\":\"think\"") "|so" DONE,
                NULL, NULL);
    cache_twice("usage", "a|$|{\"model\":\"m\",\"choices\":[],\"usage\":{"
                "\"prompt_tokens\":10,\"completion_tokens\":20,"
                "\"total_tokens\":33,\"prompt_tokens_details\":{"
                "\"cached_tokens\":4},\"completion_tokens_details\":{"
                "\"reasoning_tokens\":5}}}|[DONE]", NULL, NULL);
    cache_twice("length", "a|" DI("0", "", "\"length\"") "|[DONE]", NULL, NULL);
    cache_twice("no finish reason", "a|[DONE]", NULL, NULL);
    cache_twice("tools",
                D0("\"tool_calls\":[{\"index\":0,\"id\":\"c0\",\"function\":{"
                   "\"name\":\"f\",\"arguments\":\"\"}}]") "|"
                D0("\"tool_calls\":[{\"index\":0,\"function\":{"
                   "\"arguments\":\"{\\\"a\\\":\\\"\\\\u00e9\\\"}\"}}]") "|"
                D0("\"tool_calls\":[{\"index\":1,\"id\":\"c1\",\"function\":{"
                   "\"name\":\"g\",\"arguments\":\"{\\\"cut\"}}]") "|"
                D0("\"tool_calls\":[{\"index\":2,\"id\":\"c2\",\"function\":{"
                   "\"name\":\"h\",\"arguments\":\"\"}}]") "|"
                D0("\"tool_calls\":[{\"index\":2,\"id\":\"c3\",\"function\":{"
                   "\"name\":\"h\",\"arguments\":\"{}\"}}]") "|"
                DI("0", "", "\"tool_calls\"") "|[DONE]", NULL, NULL);
    cache_twice("choices",
                DI("2", "\"content\":\"two\"", "null") "|"
                DI("0", "\"content\":\"zero\"", "null") "|"
                DI("1", "\"refusal\":\"one\"", "null") "|"
                DI("0", "", "\"stop\"") "|" DI("1", "", "\"length\"") "|"
                DI("2", "", "\"content_filter\"") "|[DONE]",
                NULL, three_choices);
    cache_twice("whole", NULL,
                "{\"id\":\"i\",\"model\":\"m\",\"choices\":[{\"index\":0,"
                "\"message\":{\"content\":\"Hello\",\"refusal\":null},"
                "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":1,"
                "\"completion_tokens\":2,\"total_tokens\":3}}",
                not_streaming);
    cache_twice("whole with tools", NULL,
                "{\"choices\":[{\"index\":0,\"message\":{\"content\":null,"
                "\"tool_calls\":[{\"id\":\"c\",\"type\":\"function\","
                "\"function\":{\"name\":\"f\",\"arguments\":\"{}\"}},"
                "{\"id\":\"d\",\"function\":{\"name\":\"g\","
                "\"arguments\":\"[1\"}}]},\"finish_reason\":\"tool_calls\"}]}",
                not_streaming);
}

static char events_here[4096];

static int events_told(llmcb_handler *h, const llmcb_event *ev)
{
    (void)h;
    strcat(events_here, llmcb_event_name(ev->kind) + 3);
    if (ev->result && ev->result->cached) strcat(events_here, " cached");
    strcat(events_here, ";");
    return 0;
}

TEST(case_070_a_cached_answer)
{
    scene s;
    page p, q;
    llmcb_cache *cache;
    llmcb_chat *chat;
    llmcb_limiter *limiter;
    llmcb_handler seen, *all[7];
    const llmcb_run_record *r;
    size_t n, i;

    disk_init();
    page_open(&p);
    page_open(&q);
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b|$|" USED("m", "3", "4") "|[DONE]", 10,
               LLMCB_REPLAY_KEEP);
    scene_begin(&s);
    memset(&seen, 0, sizeof seen);
    seen.sync.on_chat_model_start = seen.sync.on_llm_new_token =
        seen.sync.on_llm_end = seen.sync.on_llm_error = events_told;
    *events_here = '\0';
    all[0] = &seen;
    all[1] = llmcb_usage_handler(s.loop);
    all[2] = llmcb_timing_handler(s.loop);
    all[3] = llmcb_tree_handler(s.loop, p.f);
    all[4] = llmcb_collector(s.loop);
    all[5] = llmcb_jsonl_handler(s.loop, path, true);
    all[6] = llmcb_token_handler(s.loop, q.f, false);
    cache = llmcb_cache_new(s.loop, 0);
    limiter = llmcb_limiter_new(s.loop, 60, 1);
    chat = chat_with(&s, limiter, cache, NULL);
    for (i = 0; i < 3; i++)
        CHECK_INT(asked(chat, "hi", all, 7), LLMCB_OK);
    CHECK_INT(s.spy.requests, 1);
    CHECK_INT(llmcb_loop_now(s.loop), 1000 + 50); /* of the first alone */
    CHECK_STR(events_here,
              "chat_model_start;llm_new_token;llm_new_token;llm_new_token;"
              "llm_new_token;llm_end;chat_model_start;llm_end cached;"
              "chat_model_start;llm_end cached;");
    CHECK_INT(total_of(all[1], NULL), 34);
    CHECK_INT(total_of(all[1], "m"), 34);
    CHECK_INT(llmcb_timing_of(all[2]).runs, 3);
    CHECK_INT(llmcb_timing_of(all[2]).first_token_ms, -1);
    CHECK_STR(page_text(&p), "ChatOpenAI  1.0 s, 3 + 4 tokens\n"
                             "ChatOpenAI  0 ms, 3 + 4 tokens, cached\n"
                             "ChatOpenAI  0 ms, 3 + 4 tokens, cached\n");
    CHECK_STR(page_text(&q), "ab");
    r = llmcb_collector_runs(all[4], &n);
    REQUIRE(n == 3);
    CHECK(!r[0].cached && r[1].cached && r[2].cached);
    CHECK_INT(r[0].tokens, 2);
    CHECK_INT(r[1].tokens, 0);
    CHECK_STR(r[1].output, "ab");
    CHECK_INT(count_of(read_file(path), "\"cached\":true"), 2);
    for (i = 1; i < 7; i++)
        llmcb_handler_free(all[i]);
    llmcb_chat_free(chat);
    llmcb_limiter_free(limiter);
    llmcb_cache_free(cache);
    scene_close(&s);
    page_close(&p);
    page_close(&q);
    disk_close();
}

static void other_model(llmcb_chat_desc *d) { d->model = "other"; }
static void other_url(llmcb_chat_desc *d) { d->base_url = "http://localhost/v2"; }
static void other_params(llmcb_chat_desc *d) { d->extra = "{\"seed\":1}"; }
static void other_max(llmcb_chat_desc *d) { d->max_tokens = 9; }
static void other_tools(llmcb_chat_desc *d) { d->tools = "[]"; }

TEST(cache_what_misses)
{
    scene s;
    llmcb_cache *cache;
    llmcb_chat *chat, *twin;
    llmcb_config c;
    llmcb_message m[2];
    llmcb_op *op;
    const llmcb_chunk *chunk;
    void (*others[])(llmcb_chat_desc *) = { other_model, other_url,
                                            other_params, other_max,
                                            other_tools, not_streaming };
    size_t i, tokens = 0;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_begin(&s);
    cache = llmcb_cache_new(s.loop, 0);
    chat = chat_with(&s, NULL, cache, NULL);
    twin = chat_with(&s, NULL, cache, NULL);
    asked(chat, "hi", NULL, 0);
    CHECK_INT(s.spy.requests, 1);
    asked(twin, "hi", NULL, 0); /* of another chat, but the same */
    CHECK_INT(s.spy.requests, 1);
    asked(chat, "ho", NULL, 0);
    CHECK_INT(s.spy.requests, 2);
    asked(chat, "hi ", NULL, 0);
    CHECK_INT(s.spy.requests, 3);
    for (i = 0; i < 6; i++) {
        llmcb_chat *other = chat_with(&s, NULL, cache, others[i]);
        asked(other, "hi", NULL, 0);
        CHECK_INT(s.spy.requests, 4 + i);
        llmcb_chat_free(other);
    }
    memset(m, 0, sizeof m);
    memset(&c, 0, sizeof c);
    m[0].content = "hi";
    m[0].role = LLMCB_SYSTEM;
    m[1].content = "hi";
    op = llmcb_chat_generate(chat, m, 1, NULL);
    llmcb_op_wait(op);
    llmcb_op_free(op);
    op = llmcb_chat_generate(chat, m, 2, NULL);
    llmcb_op_wait(op);
    llmcb_op_free(op);
    c.extra = "{\"temperature\":0}";
    op = llmcb_chat_generate(chat, m + 1, 1, &c);
    llmcb_op_wait(op);
    llmcb_op_free(op);
    CHECK_INT(s.spy.requests, 12);
    op = llmcb_chat_generate(chat, m + 1, 1, &c);
    llmcb_op_wait(op);
    CHECK(llmcb_op_result(op)->cached);
    llmcb_op_free(op);
    CHECK_INT(s.spy.requests, 12);
    /* a stream looks not there, and leaves nothing there */
    op = llmcb_chat_stream(chat, m + 1, 1, NULL);
    while (llmcb_op_next(op, &chunk)) tokens++;
    CHECK(tokens > 0);
    CHECK(!llmcb_op_result(op)->cached);
    llmcb_op_free(op);
    CHECK_INT(s.spy.requests, 13);
    m[1].content = "new";
    op = llmcb_chat_stream(chat, m + 1, 1, NULL);
    while (llmcb_op_next(op, &chunk)) tokens++;
    llmcb_op_free(op);
    asked(chat, "new", NULL, 0);
    CHECK_INT(s.spy.requests, 15);
    llmcb_cache_free(cache); /* the chats keep it */
    asked(twin, "new", NULL, 0);
    CHECK_INT(s.spy.requests, 15);
    llmcb_chat_free(chat);
    asked(twin, "hi", NULL, 0);
    CHECK_INT(s.spy.requests, 15);
    llmcb_chat_free(twin);
    scene_close(&s);
}

/* Failures and halves are not kept, nor log-probabilities. */
TEST(cache_what_is_not_kept)
{
    scene s;
    llmcb_cache *cache;
    llmcb_chat *chat;
    llmcb_op *op;

    scene_init(&s);
    tape_raw(&s, FAIL_HEAD("400"), 0);
    scene_tape(&s, OK_HEAD, "half", 0, LLMCB_REPLAY_RESET);
    scene_tape(&s, OK_HEAD, "cancelled" DONE, 100, LLMCB_REPLAY_KEEP);
    scene_tape(&s, OK_HEAD,
               "{\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},"
               "\"logprobs\":{\"content\":[{\"token\":\"a\"}]}}]}" DONE,
               0, LLMCB_REPLAY_KEEP);
    scene_tape(&s, OK_HEAD, "whole" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_begin(&s);
    cache = llmcb_cache_new(s.loop, 0);
    chat = chat_with(&s, NULL, cache, NULL);
    CHECK_INT(asked(chat, "hi", NULL, 0), LLMCB_EHTTP);
    CHECK(asked(chat, "hi", NULL, 0) != LLMCB_OK);
    op = ask_with(chat, "hi", NULL, 0);
    turn_to_request(&s, 3);
    llmcb_op_cancel(op);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
    llmcb_op_free(op);
    CHECK_INT(asked(chat, "hi", NULL, 0), LLMCB_OK);
    CHECK_INT(asked(chat, "hi", NULL, 0), LLMCB_OK);
    CHECK_INT(s.spy.requests, 5);
    op = ask_with(chat, "hi", NULL, 0);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(llmcb_op_result(op)->generations[0].text.ptr, "whole");
    llmcb_op_free(op);
    CHECK_INT(s.spy.requests, 5);
    llmcb_chat_free(chat);
    llmcb_cache_free(cache);
    scene_close(&s);
}

TEST(cache_the_oldest_go_first)
{
    scene s;
    llmcb_cache *cache;
    llmcb_chat *chat;
    size_t one, i;
    char text[8];

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_begin(&s);
    cache = llmcb_cache_new(s.loop, 0);
    chat = chat_with(&s, NULL, cache, NULL);
    asked(chat, "q0", NULL, 0);
    one = cache->bytes;
    llmcb_chat_free(chat);
    llmcb_cache_free(cache);
    cache = llmcb_cache_new(s.loop, 3 * one);
    chat = chat_with(&s, NULL, cache, NULL);
    for (i = 0; i < 5; i++) {
        snprintf(text, sizeof text, "q%d", (int)i);
        asked(chat, text, NULL, 0);
        CHECK(cache->bytes <= 3 * one);
    }
    CHECK_INT(s.spy.requests, 6);
    CHECK_INT(cache->bytes, 3 * one);
    for (i = 2; i < 5; i++) {
        snprintf(text, sizeof text, "q%d", (int)i);
        asked(chat, text, NULL, 0);
    }
    CHECK_INT(s.spy.requests, 6);
    asked(chat, "q1", NULL, 0);
    CHECK_INT(s.spy.requests, 7);
    asked(chat, "q2", NULL, 0); /* gone for q1 */
    CHECK_INT(s.spy.requests, 8);
    llmcb_chat_free(chat);
    llmcb_cache_free(cache);
    cache = llmcb_cache_new(s.loop, 2 * one - 1); /* one fits */
    chat = chat_with(&s, NULL, cache, NULL);
    asked(chat, "q0", NULL, 0);
    asked(chat, "q1", NULL, 0);
    CHECK_INT(cache->bytes, one);
    CHECK_INT(s.spy.requests, 10);
    llmcb_chat_free(chat);
    llmcb_cache_free(cache);
    cache = llmcb_cache_new(s.loop, one - 1); /* nothing fits */
    chat = chat_with(&s, NULL, cache, NULL);
    asked(chat, "q0", NULL, 0);
    asked(chat, "q0", NULL, 0);
    CHECK_INT(s.spy.requests, 12);
    CHECK_INT(cache->bytes, 0);
    llmcb_chat_free(chat);
    llmcb_cache_free(cache);
    scene_close(&s);
}

/* Two at once both ask; the answer is kept once. */
TEST(cache_the_same_question_twice_at_once)
{
    scene s;
    llmcb_cache *cache;
    llmcb_chat *chat;
    llmcb_op *a, *b;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 5, LLMCB_REPLAY_KEEP);
    scene_begin(&s);
    cache = llmcb_cache_new(s.loop, 0);
    chat = chat_with(&s, NULL, cache, NULL);
    a = ask_with(chat, "hi", NULL, 0);
    b = ask_with(chat, "hi", NULL, 0);
    llmcb_op_wait(a);
    llmcb_op_wait(b);
    CHECK_INT(s.spy.requests, 2);
    CHECK(cache->first && !cache->first->next);
    llmcb_op_free(a);
    llmcb_op_free(b);
    llmcb_chat_free(chat);
    llmcb_cache_free(cache);
    scene_close(&s);
}

/* A batch of which some are known: order and usage are those of a batch. */
TEST(cache_and_a_batch)
{
    scene s;
    llmcb_cache *cache;
    llmcb_chat *chat;
    llmcb_message m[3];
    llmcb_prompt prompts[3];
    llmcb_op *op;
    size_t i;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "known" DONE, 5, LLMCB_REPLAY_KEEP);
    scene_tape(&s, OK_HEAD, "new" DONE, 5, LLMCB_REPLAY_KEEP);
    scene_begin(&s);
    cache = llmcb_cache_new(s.loop, 0);
    chat = chat_with(&s, NULL, cache, NULL);
    asked(chat, "q1", NULL, 0);
    memset(m, 0, sizeof m);
    m[0].content = "q0";
    m[1].content = "q1";
    m[2].content = "q2";
    for (i = 0; i < 3; i++) {
        prompts[i].messages = &m[i];
        prompts[i].n = 1;
    }
    op = llmcb_chat_batch(chat, prompts, 3, NULL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(s.spy.requests, 3);
    for (i = 0; i < 3; i++) {
        const llmcb_result *r = llmcb_op_result_at(op, i);
        CHECK_STR(r->generations[0].text.ptr, i == 1 ? "known" : "new");
        CHECK_INT(r->cached, i == 1);
    }
    llmcb_op_free(op);
    llmcb_chat_free(chat);
    llmcb_cache_free(cache);
    scene_close(&s);
}

/* ---- no memory -------------------------------------------------------------------------- */

/* All handlers, all events, the limiter and the cache, with the i-th
 * allocation failing. Whether it did. */
static bool kit_without_memory(long i, bool for_ever)
{
    scene s;
    page p, q;
    llmcb_handler *all[8], *some[8];
    llmcb_cache *cache = NULL;
    llmcb_limiter *limiter = NULL;
    llmcb_chat *chat = NULL, *own;
    size_t k, n = 0;
    bool failed;

    scene_init(&s);
    page_open(&p);
    page_open(&q);
    all_tapes(&s);
    scene_tape(&s, OK_HEAD, "a|b|$|" USED("m-2", "3", "4") "|[DONE]", 0,
               LLMCB_REPLAY_KEEP);
    memset(all, 0, sizeof all);
    s.heap.for_ever = for_ever;
    s.heap.fail_at = i;
    if (scene_open(&s)) {
        all[0] = llmcb_usage_handler(s.loop);
        all[1] = llmcb_timing_handler(s.loop);
        all[2] = llmcb_tree_handler(s.loop, p.f);
        all[3] = llmcb_collector(s.loop);
        all[4] = llmcb_jsonl_handler(s.loop, path, true);
        all[5] = llmcb_token_handler(s.loop, q.f, false);
        all[6] = llmcb_jsonl_handler(s.loop, path, false);
        cache = llmcb_cache_new(s.loop, 0);
        limiter = llmcb_limiter_new(s.loop, 600, 1);
        chat = chat_with(&s, limiter, cache, NULL);
        for (k = 0; k < 7; k++)
            if (all[k]) some[n++] = all[k];
        own = s.chat;
        s.chat = chat;
        all_events(&s, some, n, "bad\377", false);
        asked(chat, PROMPT, some, n); /* cached by now, if it could be */
        asked(chat, "more", some, n);
        s.chat = own;
    }
    failed = i && s.heap.calls >= i;
    s.heap.fail_at = 0;
    llmcb_chat_free(chat);
    llmcb_cache_free(cache);
    llmcb_limiter_free(limiter);
    if (all[2] && records_of(all[2]))
        TEST_FAIL("allocation %ld%s: the tree is not empty", i,
                  for_ever ? " and on" : "");
    if (all[1] && ((llmcbi_kit *)(void *)all[1])->paces)
        TEST_FAIL("allocation %ld: paces", i);
    for (k = 0; k < 8; k++)
        llmcb_handler_free(all[k]);
    if (s.loop)
        scene_close(&s);
    else
        for (k = 0; k < s.n_tapes; k++) {
            free(s.bytes[k]);
            free(s.segments[k]);
        }
    page_close(&p);
    page_close(&q);
    if (test_failures_here) printf("  at allocation %ld\n", i);
    return failed;
}

static void truncate_file(void)
{
    CHECK(json_lines(read_file(path)) >= 0);
    fclose(fopen(path, "w"));
}

TEST(kit_without_memory_once)
{
    long i;

    disk_init();
    for (i = 1; kit_without_memory(i, false) && !test_failures_here; i++)
        if (i % 16 == 0) truncate_file();
    CHECK(i > 100);
    CHECK(json_lines(read_file(path)) >= 0);
    disk_close();
}

TEST(kit_without_memory_for_ever)
{
    long i;

    disk_init();
    for (i = 1; kit_without_memory(i, true) && !test_failures_here; i++)
        if (i % 16 == 0) truncate_file();
    CHECK(json_lines(read_file(path)) >= 0);
    disk_close();
}

int main(int argc, char **argv)
{
    return scene_main(argc, argv);
}
