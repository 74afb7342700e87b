/* What the peers are made of. */
#ifndef PEERS_COMMON_H
#define PEERS_COMMON_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#ifndef MAP_SYNC
#define MAP_SYNC 0x80000
#endif
#ifndef MAP_SHARED_VALIDATE
#define MAP_SHARED_VALIDATE 0x03
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static void demand(int met, const char *what)
{
    if (met)
        return;
    fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static inline struct ibv_context *open_device(const char *name)
{
    int count;
    struct ibv_device **devices = ibv_get_device_list(&count);
    demand(devices != NULL, "no list of devices");
    struct ibv_context *context = NULL;
    errno = ENODEV;
    for (int i = 0; i < count && context == NULL; i++)
        if (strcmp(ibv_get_device_name(devices[i]), name) == 0)
            context = ibv_open_device(devices[i]);
    demand(context != NULL, name);
    return context;
}

/* For one-sided access of a peer, with on-demand paging: the caller's memory may be a file on fs-DAX. */
static inline struct ibv_mr *register_on_demand(struct ibv_pd *domain, void *start, size_t len,
                                                int more)
{
    int access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
                 IBV_ACCESS_ON_DEMAND | more;
    struct ibv_mr *region = ibv_reg_mr(domain, start, len, access);
    demand(region != NULL, "ibv_reg_mr with IBV_ACCESS_ON_DEMAND");
    return region;
}

static inline void *map_whole_file(const char *path, size_t *len)
{
    enum { huge = 2 << 20 };
    int file = open(path, O_RDWR | O_CLOEXEC);
    demand(file >= 0, path);
    struct stat stat;
    demand(fstat(file, &stat) == 0, path);
    *len = (size_t)stat.st_size;
    /* Aligned as Pinfold does it, so that huge pages are as likely. */
    char *room = mmap(NULL, *len + huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    demand(room != MAP_FAILED, "mmap");
    room += (huge - (uintptr_t)room % huge) % huge;
    void *map = mmap(room, *len, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE | MAP_SYNC | MAP_FIXED,
                     file, 0);
    demand(map != MAP_FAILED, "mmap with MAP_SYNC");
    demand(madvise(map, *len, MADV_POPULATE_WRITE) == 0, "MADV_POPULATE_WRITE");
    return map;
}

#endif
