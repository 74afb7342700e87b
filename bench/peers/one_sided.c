/*
 * The peer of Pinfold's client: plain libibverbs, with the same memory, registration mode, queue pair
 * attributes, depth and signalling. `one_sided target DEVICE FILE` maps a file on fs-DAX and registers it
 * with on-demand paging; `one_sided initiator DEVICE` writes to it and reads from it. They speak to who
 * started them, line by line, so that rounds of theirs can stand between rounds of somebody else's. With
 * a last word `flush`, both can flush: `write_and_flush`, one at a time.
 */
#include "common.h"

#include <unistd.h>

enum { DEPTH_MAX = 64, OPERATION_MAX = 1 << 20 };

/* As in verbs/src/queue_pair.rs. */
enum { TIMEOUT = 19, RETRY_COUNT = 6, MIN_RNR_TIMER = 12, READS_IN_FLIGHT = 16, HOP_LIMIT = 64 };

/* What rdma-core has since 45 (verbs.h). Older headers do, so that whatever is there compiles it. */
enum {
    FLUSH_GLOBAL_ACCESS = 1 << 8,
    FLUSH_PERSISTENT_ACCESS = 1 << 9,
    WITH_FLUSH = 1 << 11,
    PERSISTENT = 1 << 1,
    RANGE = 0,
};
typedef void (*flush_call)(struct ibv_qp_ex *pair, uint32_t key, uint64_t address, size_t len, uint8_t type,
                           uint8_t level);

struct connection {
    struct ibv_context *context;
    struct ibv_pd *domain;
    struct ibv_comp_channel *channel;
    struct ibv_cq *completions;
    struct ibv_qp *queue_pair;
    int gid_index;
    union ibv_gid gid;
    uint64_t remote_address;
    uint32_t remote_key;
};

/* The first RoCE v2 address that is an IPv4 one, as Pinfold prefers it; else the first of all. */
static void choose_gid(struct connection *c)
{
    struct ibv_port_attr port;
    demand(ibv_query_port(c->context, 1, &port) == 0, "ibv_query_port");
    for (int i = 0; i < port.gid_tbl_len; i++) {
        union ibv_gid gid;
        static const unsigned char mapped[12] = { [10] = 0xff, [11] = 0xff };
        if (ibv_query_gid(c->context, 1, i, &gid) == 0 && memcmp(gid.raw, mapped, 12) == 0) {
            c->gid = gid;
            c->gid_index = i;
            return;
        }
    }
    demand(ibv_query_gid(c->context, 1, 0, &c->gid) == 0, "ibv_query_gid");
    c->gid_index = 0;
}

static int access_of(int with_flush)
{
    return with_flush ? FLUSH_GLOBAL_ACCESS | FLUSH_PERSISTENT_ACCESS : 0;
}

static struct ibv_qp *create_with_flush(struct connection *c, const struct ibv_qp_init_attr *wanted)
{
    struct ibv_qp_init_attr_ex wide = {
        .send_cq = wanted->send_cq,
        .recv_cq = wanted->recv_cq,
        .cap = wanted->cap,
        .qp_type = wanted->qp_type,
        .comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
        .pd = c->domain,
        .send_ops_flags = IBV_QP_EX_WITH_RDMA_WRITE | WITH_FLUSH,
    };
    return ibv_create_qp_ex(c->context, &wide);
}

static void create(struct connection *c, const char *device, int with_flush)
{
    c->context = open_device(device);
    demand((c->domain = ibv_alloc_pd(c->context)) != NULL, "ibv_alloc_pd");
    demand((c->channel = ibv_create_comp_channel(c->context)) != NULL, "ibv_create_comp_channel");
    c->completions = ibv_create_cq(c->context, DEPTH_MAX, NULL, c->channel, 0);
    demand(c->completions != NULL, "ibv_create_cq");
    struct ibv_qp_init_attr wanted = {
        .send_cq = c->completions,
        .recv_cq = c->completions,
        .cap = { .max_send_wr = DEPTH_MAX, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1 },
        .qp_type = IBV_QPT_RC,
    };
    c->queue_pair = with_flush ? create_with_flush(c, &wanted) : ibv_create_qp(c->domain, &wanted);
    demand(c->queue_pair != NULL, "no queue pair");
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_INIT,
        .port_num = 1,
        .qp_access_flags =
            (unsigned)(IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE | access_of(with_flush)),
    };
    int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
    demand(ibv_modify_qp(c->queue_pair, &attr, mask) == 0, "to INIT");
    choose_gid(c);
    printf("endpoint %u 0 ", c->queue_pair->qp_num);
    for (int i = 0; i < 16; i++)
        printf("%02x", c->gid.raw[i]);
    printf("\n");
    fflush(stdout);
}

/* Ours begin with packet 0, the peer's with what it says. */
static void connect_to(struct connection *c, uint32_t number, uint32_t packet, const char *gid)
{
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = IBV_MTU_4096,
        .dest_qp_num = number,
        .rq_psn = packet,
        .max_dest_rd_atomic = READS_IN_FLIGHT,
        .min_rnr_timer = MIN_RNR_TIMER,
        .ah_attr = { .is_global = 1, .port_num = 1 },
    };
    for (int i = 0; i < 16; i++)
        sscanf(gid + 2 * i, "%2hhx", &attr.ah_attr.grh.dgid.raw[i]);
    attr.ah_attr.grh.sgid_index = (uint8_t)c->gid_index;
    attr.ah_attr.grh.hop_limit = HOP_LIMIT;
    int mask = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
               IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
    demand(ibv_modify_qp(c->queue_pair, &attr, mask) == 0, "to RTR");
    attr.qp_state = IBV_QPS_RTS;
    attr.timeout = TIMEOUT;
    attr.retry_cnt = RETRY_COUNT;
    attr.rnr_retry = RETRY_COUNT;
    attr.max_rd_atomic = READS_IN_FLIGHT;
    mask = IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
           IBV_QP_MAX_QP_RD_ATOMIC;
    demand(ibv_modify_qp(c->queue_pair, &attr, mask) == 0, "to RTS");
}

static int target(const char *device, const char *path, int with_flush)
{
    struct connection c;
    create(&c, device, with_flush);
    size_t len;
    void *map = map_whole_file(path, &len);
    struct ibv_mr *region = register_on_demand(c.domain, map, len, access_of(with_flush));
    printf("memory %" PRIu64 " %u\n", (uint64_t)(uintptr_t)map, region->rkey);
    fflush(stdout);
    uint32_t number, packet;
    char gid[33];
    demand(scanf("connect %u %u %32s", &number, &packet, gid) == 3, "no endpoint");
    connect_to(&c, number, packet, gid);
    printf("ready\n");
    fflush(stdout);
    while (getchar() != EOF)
        ;
    return 0;
}

static void post(struct connection *c, struct ibv_mr *own, enum ibv_wr_opcode opcode, size_t size,
                 unsigned slot, uint64_t offset)
{
    struct ibv_sge list = {
        .addr = (uint64_t)(uintptr_t)own->addr + (uint64_t)slot * size,
        .length = (uint32_t)size,
        .lkey = own->lkey,
    };
    struct ibv_send_wr request = {
        .wr_id = slot,
        .sg_list = &list,
        .num_sge = 1,
        .opcode = opcode,
        .send_flags = IBV_SEND_SIGNALED,
        .wr.rdma = { .remote_addr = c->remote_address + offset, .rkey = c->remote_key },
    };
    struct ibv_send_wr *refused;
    demand(ibv_post_send(c->queue_pair, &request, &refused) == 0, "ibv_post_send");
}

/* One or more completions: by looking again and again, or asleep until the device tells. */
static int take(struct connection *c, struct ibv_wc *done, int asleep)
{
    for (;;) {
        int taken = ibv_poll_cq(c->completions, 16, done);
        demand(taken >= 0, "ibv_poll_cq");
        if (taken > 0)
            return taken;
        if (!asleep)
            continue;
        demand(ibv_req_notify_cq(c->completions, 0) == 0, "ibv_req_notify_cq");
        taken = ibv_poll_cq(c->completions, 16, done);
        demand(taken >= 0, "ibv_poll_cq");
        if (taken > 0)
            return taken;
        struct ibv_cq *queue;
        void *context;
        demand(ibv_get_cq_event(c->channel, &queue, &context) == 0, "ibv_get_cq_event");
        ibv_ack_cq_events(queue, 1);
    }
}

static void check(const struct ibv_wc *done)
{
    if (done->status == IBV_WC_SUCCESS)
        return;
    fprintf(stderr, "one_sided: %s\n", ibv_wc_status_str(done->status));
    exit(1);
}

static void post_write_and_flush(struct connection *c, struct ibv_mr *own, size_t size, uint64_t offset)
{
    struct ibv_qp_ex *pair = ibv_qp_to_qp_ex(c->queue_pair);
    /* Behind the last call that older headers know come wr_atomic_write and wr_flush. */
    flush_call flush;
    memcpy(&flush, (char *)&pair->wr_abort + 2 * sizeof pair->wr_abort, sizeof flush);
    ibv_wr_start(pair);
    pair->wr_id = 0;
    pair->wr_flags = 0;
    ibv_wr_rdma_write(pair, c->remote_key, c->remote_address + offset);
    ibv_wr_set_sge(pair, own->lkey, (uint64_t)(uintptr_t)own->addr, (uint32_t)size);
    pair->wr_id = 1;
    pair->wr_flags = IBV_SEND_SIGNALED;
    flush(pair, c->remote_key, c->remote_address + offset, size, PERSISTENT, RANGE);
    demand(ibv_wr_complete(pair) == 0, "ibv_wr_complete");
}

static uint64_t write_and_flush(struct connection *c, struct ibv_mr *own, size_t size, uint64_t count,
                                uint64_t stride, uint64_t places, int asleep)
{
    uint64_t started = now_ns();
    for (uint64_t i = 0; i < count; i++) {
        struct ibv_wc done[16];
        post_write_and_flush(c, own, size, i % places * stride);
        take(c, done, asleep);
        check(done);
    }
    return now_ns() - started;
}

static uint64_t transfer(struct connection *c, struct ibv_mr *own, enum ibv_wr_opcode opcode,
                         size_t size, unsigned depth, uint64_t count, uint64_t stride, uint64_t places,
                         int asleep)
{
    uint64_t posted = 0, ended = 0, started = now_ns();
    while (posted < depth && posted < count) {
        post(c, own, opcode, size, (unsigned)posted, posted % places * stride);
        posted++;
    }
    while (ended < count) {
        struct ibv_wc done[16];
        int taken = take(c, done, asleep);
        for (int i = 0; i < taken; i++) {
            check(&done[i]);
            ended++;
            if (posted < count) {
                post(c, own, opcode, size, (unsigned)done[i].wr_id, posted % places * stride);
                posted++;
            }
        }
    }
    return now_ns() - started;
}

static int initiator(const char *device, int with_flush)
{
    struct connection c;
    create(&c, device, with_flush);
    uint32_t number, packet;
    char gid[33];
    int read = scanf("connect %u %u %32s %" SCNu64 " %u", &number, &packet, gid, &c.remote_address,
                     &c.remote_key);
    demand(read == 5, "no endpoint");
    connect_to(&c, number, packet, gid);
    size_t len = (size_t)DEPTH_MAX * OPERATION_MAX / 4;
    void *buffer = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    demand(buffer != MAP_FAILED, "mmap");
    struct ibv_mr *own = ibv_reg_mr(c.domain, buffer, len, IBV_ACCESS_LOCAL_WRITE);
    demand(own != NULL, "ibv_reg_mr");
    printf("ready\n");
    fflush(stdout);
    char what[16], how[8];
    size_t size;
    unsigned depth;
    uint64_t count, stride, places;
    while (scanf("%15s %zu %u %" SCNu64 " %" SCNu64 " %" SCNu64 " %7s", what, &size, &depth, &count,
                 &stride, &places, how) == 7) {
        errno = EINVAL;
        demand(depth >= 1 && depth <= DEPTH_MAX && size * depth <= len && places > 0, "bad request");
        enum ibv_wr_opcode opcode = strcmp(what, "read") ? IBV_WR_RDMA_WRITE : IBV_WR_RDMA_READ;
        int asleep = strcmp(how, "poll") != 0;
        int flushed = strcmp(what, "write_and_flush") == 0;
        demand(with_flush || !flushed, "started without `flush`");
        uint64_t took = flushed
                            ? write_and_flush(&c, own, size, count, stride, places, asleep)
                            : transfer(&c, own, opcode, size, depth, count, stride, places, asleep);
        printf("took %" PRIu64 "\n", took);
        fflush(stdout);
    }
    return 0;
}

int main(int argc, char **argv)
{
    int with_flush = argc > 3 && strcmp(argv[argc - 1], "flush") == 0;
    if (with_flush)
        argc--;
    if (argc == 4 && strcmp(argv[1], "target") == 0)
        return target(argv[2], argv[3], with_flush);
    if (argc == 3 && strcmp(argv[1], "initiator") == 0)
        return initiator(argv[2], with_flush);
    fprintf(stderr, "usage: one_sided target DEVICE FILE [flush] | one_sided initiator DEVICE [flush]\n");
    return 2;
}
