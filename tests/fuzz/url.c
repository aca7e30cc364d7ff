/* Addresses: one that is accepted can be put together again from its parts,
 * and a key goes out in clear text only to this machine. */
#include "fuzz.h"

#include <arpa/inet.h>

static bool ends_right(llmcb_str host)
{
    unsigned char address[4];
    char text[16];

    if (llmcbi_str_is_nocase(host, "localhost") || llmcbi_str_is(host, "::1"))
        return true;
    if (host.len >= sizeof text || memchr(host.ptr, 0, host.len)) return false;
    memcpy(text, host.ptr, host.len);
    text[host.len] = '\0';
    return inet_pton(AF_INET, text, address) == 1 && address[0] == 127;
}

static void check_tcp(const llmcbi_url *u, const char *url)
{
    char port[8];
    llmcbi_buf again;
    bool bracket = *u->authority.ptr == '[';
    llmcb_str tail = u->authority;

    memset(&again, 0, sizeof again);
    fuzz_note(&again, u->tls ? "https://" : "http://", u->tls ? 8 : 7);
    fuzz_note(&again, u->authority.ptr, u->authority.len);
    if (*u->target.ptr != '/' || url[again.len])
        fuzz_note(&again, u->target.ptr, u->target.len);
    FUZZ_CHECK(strcmp(again.ptr, url) == 0);
    fuzz_drop(&again);
    /* what a connection goes to is what the Host field says */
    FUZZ_CHECK(u->host.len && u->host.ptr == tail.ptr + bracket);
    tail.ptr += u->host.len + 2 * (size_t)bracket;
    tail.len -= u->host.len + 2 * (size_t)bracket;
    if (!tail.len) {
        FUZZ_CHECK(u->port == (u->tls ? 443 : 80));
    } else {
        FUZZ_CHECK(*tail.ptr == ':' && tail.len > 1);
        while (tail.len > 2 && tail.ptr[1] == '0')
            tail.ptr++, tail.len--;
        FUZZ_CHECK((size_t)sprintf(port, "%u", (unsigned)u->port) ==
                       tail.len - 1 &&
                   memcmp(port, tail.ptr + 1, tail.len - 1) == 0);
    }
    FUZZ_CHECK(!memchr(u->authority.ptr, '@', u->authority.len));
    FUZZ_CHECK(!memchr(u->authority.ptr, '/', u->authority.len));
    FUZZ_CHECK(!strchr(u->target.ptr, '#'));
    FUZZ_CHECK(llmcbi_url_is_local(u) == ends_right(u->host));
}

/* The same as the base of a chat with a key. */
static void check_chat(const char *base)
{
    static llmcb_loop *loop;
    llmcb_chat_desc d;
    llmcb_chat *chat;
    llmcbi_url u;

    if (!loop) loop = llmcb_loop_new(NULL);
    memset(&d, 0, sizeof d);
    d.base_url = base;
    d.api_key = "sk-abc";
    d.organization = "";
    chat = llmcb_chat_new(loop, &d);
    if (!chat) abort();
    if (llmcb_chat_error(chat)->code == LLMCB_OK) {
        const char *query = strchr(base, ':') + 1;
        FUZZ_CHECK(!llmcbi_url_parse(&u, chat->url));
        if (u.unix_path.len) query = strchr(query, ':'); /* a path has none */
        query = strchr(query, '?');
        FUZZ_CHECK(u.tls || u.unix_path.len || ends_right(u.host));
        FUZZ_CHECK(strstr(u.target.ptr, "/chat/completions"));
        if (query)
            FUZZ_CHECK(llmcbi_ends_with(u.target, query));
        else
            FUZZ_CHECK(llmcbi_ends_with(u.target, "/chat/completions"));
        FUZZ_CHECK(chat->openai ==
                   (llmcbi_str_is_nocase(u.host, "api.openai.com") ||
                    llmcbi_ends_with(u.host, ".azure.com")));
    }
    llmcb_chat_free(chat);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *url = (char *)malloc(size + 1);
    const char *why;
    llmcbi_url u;

    if (!url) abort();
    memcpy(url, data, size);
    url[size] = '\0';
    why = llmcbi_url_parse(&u, url);
    if (!why) {
        FUZZ_CHECK(llmcbi_clean_text(url) && !strchr(url, ' '));
        FUZZ_CHECK(*u.target.ptr == '/');
        if (u.unix_path.len)
            FUZZ_CHECK(u.unix_path.ptr == url + 5 && llmcbi_url_is_local(&u) &&
                       u.unix_path.ptr[u.unix_path.len] == ':' &&
                       u.target.ptr == u.unix_path.ptr + u.unix_path.len + 1);
        else
            check_tcp(&u, url);
    }
    check_chat(url);
    free(url);
    return 0;
}
