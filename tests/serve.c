/* Plays recorded responses on the loopback:
 *
 *     serve [-u PATH] [-p PORT] FILE.http...
 *
 * Prints "port N" (or "path PATH") when it listens, one line for each
 * request, and ends after 60 s or at the end of its standard input. */
#include "server.h"

int main(int argc, char **argv)
{
    const char *path = NULL;
    int port = 0, opt;
    server_script scripts[256];
    size_t n = 0, shown = 0;
    server *s;

    while ((opt = getopt(argc, argv, "u:p:")) != -1) {
        if (opt == 'u') path = optarg;
        else if (opt == 'p') port = atoi(optarg);
        else optind = argc;
    }
    for (; optind < argc && n < 256; optind++) {
        size_t k = server_load_all(argv[optind], scripts + n, 256 - n);
        if (!k) return 1;
        n += k;
    }
    if (!n) {
        fprintf(stderr, "usage: serve [-u PATH] [-p PORT] FILE.http...\n");
        return 2;
    }
    s = server_start_at(path, port, scripts, n);
    while (n) server_unload(&scripts[--n]);
    if (!s) return 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (path) printf("path %s\n", path);
    else printf("port %d\n", server_port(s));
    while (server_now(s) < SERVER_LIFE_MS) {
        struct pollfd in = { 0, POLLIN, 0 };
        char buf[256];

        /* Standard input has no condition variable, hence the interval. */
        if (poll(&in, 1, 100) > 0 && read(0, buf, sizeof buf) <= 0) break;
        for (; shown < server_requests(s); shown++) {
            const server_req *r = server_request(s, shown);
            printf("request %d on connection %d: %.*s\n", (int)shown + 1,
                   (int)r->conn + 1, (int)strcspn(r->head, "\r"), r->head);
        }
    }
    server_stop(s);
    return 0;
}
