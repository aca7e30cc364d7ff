/* What people write by hand: libcurl's multi interface on one epoll, the
 * body split into lines, cJSON for each event, one handler call, text kept.
 * Allocations of both libraries are counted through their own hooks. */
/* build: -lcurl -lcjson */
#include "bench.h"

#include <cjson/cJSON.h>
#include <curl/curl.h>
#include <sys/epoll.h>

#define SLICE 256 /* transfers that are added between two waits */

typedef struct stream {
    CURL *easy;
    char *text, *line;
    size_t len, cap, line_len, line_cap;
    char body[512];
    int done, error;
} stream;

static CURLM *multi;
static int epoll_fd;
static double timer_at = -1; /* seconds; below 0: none */

static void *counting_malloc(size_t n)
{
    bench.allocs++;
    return malloc(n);
}

static void *counting_realloc(void *p, size_t n)
{
    bench.allocs++;
    return realloc(p, n);
}

static void *counting_calloc(size_t n, size_t size)
{
    bench.allocs++;
    return calloc(n, size);
}

static char *counting_strdup(const char *s)
{
    char *p = (char *)counting_malloc(strlen(s) + 1);

    return p ? strcpy(p, s) : NULL;
}

static void count(const char *text)
{
    if (*text) bench_progress(++bench.tokens);
}

static void (*volatile handler)(const char *text) = count;

static void add(char **p, size_t *len, size_t *cap, const char *s, size_t n)
{
    if (!n) return;
    if (*len + n > *cap) {
        *cap = 2 * (*len + n);
        *p = (char *)counting_realloc(*p, *cap);
        if (!*p) exit(2);
    }
    memcpy(*p + *len, s, n);
    *len += n;
}

static void take_line(stream *s, const char *line, size_t len)
{
    cJSON *root, *delta, *content;

    if (len < 6 || memcmp(line, "data: ", 6) != 0) return;
    line += 6;
    len -= 6;
    if (len == 6 && memcmp(line, "[DONE]", 6) == 0) {
        s->done = 1;
        return;
    }
    root = cJSON_ParseWithLength(line, len);
    delta = cJSON_GetObjectItemCaseSensitive(
        cJSON_GetArrayItem(
            cJSON_GetObjectItemCaseSensitive(root, "choices"), 0),
        "delta");
    content = cJSON_GetObjectItemCaseSensitive(delta, "content");
    if (!root) s->error = 1;
    if (cJSON_IsString(content)) {
        handler(content->valuestring);
        add(&s->text, &s->len, &s->cap, content->valuestring,
            strlen(content->valuestring));
    }
    cJSON_Delete(root);
}

static size_t take(char *p, size_t one, size_t n, void *user)
{
    stream *s = (stream *)user;
    char *end = p + n * one, *lf;

    bench.reads++;
    for (; (lf = (char *)memchr(p, '\n', (size_t)(end - p))); p = lf + 1) {
        if (!s->line_len) {
            take_line(s, p, (size_t)(lf - p));
            continue;
        }
        add(&s->line, &s->line_len, &s->line_cap, p, (size_t)(lf - p));
        take_line(s, s->line, s->line_len);
        s->line_len = 0;
    }
    add(&s->line, &s->line_len, &s->line_cap, p, (size_t)(end - p));
    return n * one;
}

static int on_socket(CURL *easy, curl_socket_t fd, int what, void *user,
                     void *known)
{
    struct epoll_event ev = { .events = 0 };

    (void)easy;
    (void)user;
    if (what == CURL_POLL_REMOVE) {
        epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
        return 0;
    }
    if (what & CURL_POLL_IN) ev.events |= EPOLLIN;
    if (what & CURL_POLL_OUT) ev.events |= EPOLLOUT;
    ev.data.fd = fd;
    epoll_ctl(epoll_fd, known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &ev);
    curl_multi_assign(multi, fd, &epoll_fd);
    return 0;
}

static int on_timer(CURLM *m, long ms, void *user)
{
    (void)m;
    (void)user;
    timer_at = ms < 0 ? -1 : bench_wall() + (double)ms / 1e3;
    return 0;
}

static void open_stream(stream *s, int port, unsigned tokens, unsigned seed,
                        struct curl_slist *headers)
{
    char url[64];

    snprintf(url, sizeof url, "http://127.0.0.1:%d/v1/chat/completions",
             port);
    snprintf(s->body, sizeof s->body,
             "{\"messages\":[{\"role\":\"user\",\"content\":"
             "\"Tell me a joke\"}],\"model\":\"gpt-4o-mini\","
             "\"stream\":true,\"stream_options\":{\"include_usage\":true},"
             "\"max_tokens\":%u,\"seed\":%u}", tokens, seed);
    s->easy = curl_easy_init();
    curl_easy_setopt(s->easy, CURLOPT_URL, url);
    curl_easy_setopt(s->easy, CURLOPT_PROXY, "");
    curl_easy_setopt(s->easy, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(s->easy, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(s->easy, CURLOPT_POSTFIELDS, s->body);
    curl_easy_setopt(s->easy, CURLOPT_WRITEFUNCTION, take);
    curl_easy_setopt(s->easy, CURLOPT_WRITEDATA, s);
    curl_easy_setopt(s->easy, CURLOPT_PRIVATE, s);
    curl_multi_add_handle(multi, s->easy);
}

static unsigned take_finished(void)
{
    CURLMsg *m;
    unsigned n = 0;
    int left;

    while ((m = curl_multi_info_read(multi, &left)) != NULL) {
        char *p = NULL;
        CURL *easy = m->easy_handle;
        CURLcode result = m->data.result;
        stream *s;
        if (m->msg != CURLMSG_DONE) continue;
        curl_easy_getinfo(easy, CURLINFO_PRIVATE, &p);
        s = (stream *)(void *)p;
        if (result != CURLE_OK || !s->done || s->error) bench.errors++;
        bench_add_text(s->text ? s->text : "", s->len);
        free(s->text);
        free(s->line);
        curl_multi_remove_handle(multi, easy);
        curl_easy_cleanup(easy);
        n++;
    }
    return n;
}

static int wait_ms(int more_to_open)
{
    double left;

    if (more_to_open) return 0;
    if (timer_at < 0) return -1;
    left = timer_at - bench_wall();
    return left <= 0 ? 0 : (int)(left * 1e3) + 1;
}

int main(int argc, char **argv)
{
    cJSON_Hooks hooks = { counting_malloc, free };
    struct epoll_event ev[128];
    struct curl_slist *headers;
    unsigned n = 1, tokens = 100, started = 0, finished = 0, i;
    int port = 0, opt, k, got, running;
    stream *streams;

    while ((opt = getopt(argc, argv, "p:n:t:x:H:k:")) != -1) {
        if (opt == 'p') port = atoi(optarg);
        else if (opt == 'n') n = (unsigned)atoi(optarg);
        else if (opt == 't') tokens = (unsigned)atoi(optarg);
    }
    if (port <= 0) return 2;
    bench_begin(n, tokens);
    curl_global_init_mem(CURL_GLOBAL_DEFAULT, counting_malloc, free,
                         counting_realloc, counting_strdup, counting_calloc);
    cJSON_InitHooks(&hooks);
    streams = (stream *)calloc(n, sizeof *streams);
    headers = curl_slist_append(NULL, "Content-Type: application/json");
    headers = curl_slist_append(headers, "Expect:");
    multi = curl_multi_init();
    epoll_fd = epoll_create1(0);
    if (!streams || !headers || !multi || epoll_fd < 0) return 2;
    curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, on_socket);
    curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, on_timer);
    while (finished < n) {
        for (i = 0; i < SLICE && started < n; i++, started++)
            open_stream(&streams[started], port, tokens, started, headers);
        got = epoll_wait(epoll_fd, ev, 128, wait_ms(started < n));
        bench.waits++;
        for (k = 0; k < got; k++)
            curl_multi_socket_action(
                multi, ev[k].data.fd,
                (ev[k].events & (EPOLLIN | EPOLLHUP) ? CURL_CSELECT_IN : 0) |
                    (ev[k].events & EPOLLOUT ? CURL_CSELECT_OUT : 0) |
                    (ev[k].events & EPOLLERR ? CURL_CSELECT_ERR : 0),
                &running);
        if (timer_at >= 0 && bench_wall() >= timer_at) {
            timer_at = -1;
            curl_multi_socket_action(multi, CURL_SOCKET_TIMEOUT, 0, &running);
        }
        finished += take_finished();
    }
    curl_multi_cleanup(multi);
    curl_slist_free_all(headers);
    curl_global_cleanup();
    free(streams);
    return bench_end("curl_cjson");
}
