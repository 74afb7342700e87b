/*
 * The peer of a write that is known to have arrived: librpma, with the same memory, registration mode and
 * depth. `librpma target ADDRESS PORT FILE` maps a file on fs-DAX and lets one other write to it;
 * `librpma initiator ADDRESS PORT` is that other. rpma_flush(3) for visibility is a READ of a few bytes
 * behind the WRITE. They connect by rdma_cm, so they need an address of the device, and path MTU and
 * timeouts are rdma_cm's. They speak to who started them, line by line.
 */
#include "common.h"

#include <librpma.h>
#include <unistd.h>

enum { OPERATION_MAX = 1 << 20 };

static void demand_rpma(int code, const char *what)
{
    if (code == 0)
        return;
    fprintf(stderr, "librpma: %s: %s\n", what, rpma_err_2str(code));
    exit(1);
}

static struct rpma_peer *open_peer(const char *address, enum rpma_util_ibv_context_type type)
{
    struct ibv_context *context;
    struct rpma_peer *peer;
    demand_rpma(rpma_utils_get_ibv_context(address, type, &context), address);
    demand_rpma(rpma_peer_new(context, &peer), "rpma_peer_new");
    return peer;
}

static void await(struct rpma_conn *connection, enum rpma_conn_event wanted)
{
    enum rpma_conn_event event;
    demand_rpma(rpma_conn_next_event(connection, &event), "rpma_conn_next_event");
    if (event == wanted)
        return;
    fprintf(stderr, "librpma: %s\n", rpma_utils_conn_event_2str(event));
    exit(1);
}

static int target(const char *address, const char *port, const char *path)
{
    struct rpma_peer *peer = open_peer(address, RPMA_UTIL_IBV_CONTEXT_LOCAL);
    size_t len, descriptor_len;
    void *map = map_whole_file(path, &len);
    struct rpma_mr_local *memory;
    int usage = RPMA_MR_USAGE_WRITE_DST | RPMA_MR_USAGE_READ_SRC | RPMA_MR_USAGE_FLUSH_TYPE_VISIBILITY;
    demand_rpma(rpma_mr_reg(peer, map, len, usage, &memory), "rpma_mr_reg");
    char descriptor[256];
    demand_rpma(rpma_mr_get_descriptor_size(memory, &descriptor_len), "rpma_mr_get_descriptor_size");
    errno = EMSGSIZE;
    demand(descriptor_len <= sizeof descriptor, "the descriptor of the memory");
    demand_rpma(rpma_mr_get_descriptor(memory, descriptor), "rpma_mr_get_descriptor");
    struct rpma_ep *endpoint;
    demand_rpma(rpma_ep_listen(peer, address, port, &endpoint), "rpma_ep_listen");
    printf("listening\n");
    fflush(stdout);
    struct rpma_conn_req *request;
    struct rpma_conn *connection;
    struct rpma_conn_private_data told = { .ptr = descriptor, .len = (uint8_t)descriptor_len };
    demand_rpma(rpma_ep_next_conn_req(endpoint, NULL, &request), "rpma_ep_next_conn_req");
    demand_rpma(rpma_conn_req_connect(&request, &told, &connection), "rpma_conn_req_connect");
    await(connection, RPMA_CONN_ESTABLISHED);
    printf("ready\n");
    fflush(stdout);
    while (getchar() != EOF)
        ;
    return 0;
}

/* Asleep until it is there. What woke us may have been the event of one that was taken before. */
static void await_completion(struct rpma_cq *completions)
{
    struct ibv_wc done;
    int none;
    while ((none = rpma_cq_get_wc(completions, 1, &done, NULL)) == RPMA_E_NO_COMPLETION)
        demand_rpma(rpma_cq_wait(completions), "rpma_cq_wait");
    demand_rpma(none, "rpma_cq_get_wc");
    if (done.status == IBV_WC_SUCCESS)
        return;
    fprintf(stderr, "librpma: %s\n", ibv_wc_status_str(done.status));
    exit(1);
}

static int initiator(const char *address, const char *port)
{
    struct rpma_peer *peer = open_peer(address, RPMA_UTIL_IBV_CONTEXT_REMOTE);
    void *buffer = mmap(NULL, OPERATION_MAX, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    demand(buffer != MAP_FAILED, "mmap");
    struct rpma_mr_local *own;
    demand_rpma(rpma_mr_reg(peer, buffer, OPERATION_MAX, RPMA_MR_USAGE_WRITE_SRC, &own), "rpma_mr_reg");
    struct rpma_conn_req *request;
    struct rpma_conn *connection;
    demand_rpma(rpma_conn_req_new(peer, address, port, NULL, &request), "rpma_conn_req_new");
    demand_rpma(rpma_conn_req_connect(&request, NULL, &connection), "rpma_conn_req_connect");
    await(connection, RPMA_CONN_ESTABLISHED);
    struct rpma_conn_private_data told;
    demand_rpma(rpma_conn_get_private_data(connection, &told), "rpma_conn_get_private_data");
    struct rpma_mr_remote *memory;
    demand_rpma(rpma_mr_remote_from_descriptor(told.ptr, told.len, &memory),
                "rpma_mr_remote_from_descriptor");
    struct rpma_cq *completions;
    demand_rpma(rpma_conn_get_cq(connection, &completions), "rpma_conn_get_cq");
    printf("ready\n");
    fflush(stdout);
    size_t size;
    uint64_t count, stride, places;
    while (scanf("%zu %" SCNu64 " %" SCNu64 " %" SCNu64, &size, &count, &stride, &places) == 4) {
        errno = EINVAL;
        demand(size <= OPERATION_MAX && places > 0, "bad request");
        uint64_t started = now_ns();
        for (uint64_t i = 0; i < count; i++) {
            size_t offset = i % places * stride;
            demand_rpma(rpma_write(connection, memory, offset, own, 0, size, RPMA_F_COMPLETION_ON_ERROR,
                                   NULL), "rpma_write");
            demand_rpma(rpma_flush(connection, memory, offset, size, RPMA_FLUSH_TYPE_VISIBILITY,
                                   RPMA_F_COMPLETION_ALWAYS, NULL), "rpma_flush");
            await_completion(completions);
        }
        printf("took %" PRIu64 "\n", now_ns() - started);
        fflush(stdout);
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 5 && strcmp(argv[1], "target") == 0)
        return target(argv[2], argv[3], argv[4]);
    if (argc == 4 && strcmp(argv[1], "initiator") == 0)
        return initiator(argv[2], argv[3]);
    fprintf(stderr, "usage: librpma target ADDRESS PORT FILE | librpma initiator ADDRESS PORT\n");
    return 2;
}
