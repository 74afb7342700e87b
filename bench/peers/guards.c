/*
 * The peer of Pinfold's guards and pins: what a C program would do without it. It speaks to who started it,
 * line by line.
 *
 *   guards arm FILE            `arm COUNT`: takes a delegation (a lease where there is none) and lets it go,
 *                              with the signal's number and owner set, COUNT times
 *   guards pin DEVICE FILE     `pin BYTES COUNT`: populates, registers on demand and deregisters
 *   guards hold DEVICE FILE    `hold BYTES REGIONS`: maps, registers that many regions of a page, guards;
 *                              then waits for a break, cuts all off by one mprotect(2), lets the guard go
 *                              and only then deregisters
 */
#include "common.h"

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE = 4096, SET_DELEGATION = 1024 + 16 };

/* include/uapi/linux/fcntl.h of Linux 6.19 */
struct delegation {
    uint32_t flags;
    uint16_t type;
    uint16_t pad;
};

static void answer(uint64_t took)
{
    printf("took %" PRIu64 "\n", took);
    fflush(stdout);
}

static int set_guard(int file, uint16_t type)
{
    static int has_delegations = 1;
    if (has_delegations) {
        struct delegation wanted = { .type = type };
        int set = fcntl(file, SET_DELEGATION, &wanted);
        if (set == 0 || errno != EINVAL)
            return set;
        has_delegations = 0;
    }
    return fcntl(file, F_SETLEASE, type);
}

static void arm(int file)
{
    struct f_owner_ex owner = { .type = F_OWNER_TID, .pid = (pid_t)syscall(SYS_gettid) };
    demand(fcntl(file, F_SETSIG, SIGRTMIN) == 0, "F_SETSIG");
    demand(fcntl(file, F_SETOWN_EX, &owner) == 0, "F_SETOWN_EX");
    /* The inode may be busy for a moment. */
    int set;
    do
        set = set_guard(file, F_WRLCK);
    while (set != 0 && errno == EAGAIN);
    demand(set == 0, "no guard");
}

static void disarm(int file)
{
    demand(set_guard(file, F_UNLCK) == 0, "the guard stays");
}

static int open_file(const char *path)
{
    int file = open(path, O_RDWR | O_CLOEXEC);
    demand(file >= 0, path);
    return file;
}

static char *map_file(int file, size_t len)
{
    char *map = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE | MAP_SYNC, file, 0);
    demand(map != MAP_FAILED, "mmap with MAP_SYNC");
    return map;
}

static struct ibv_pd *open_domain(const char *name)
{
    struct ibv_pd *domain = ibv_alloc_pd(open_device(name));
    demand(domain != NULL, "ibv_alloc_pd");
    return domain;
}

static int arming(const char *path)
{
    int file = open_file(path);
    uint64_t count;
    printf("ready\n");
    fflush(stdout);
    while (scanf(" arm %" SCNu64, &count) == 1) {
        uint64_t started = now_ns();
        for (uint64_t i = 0; i < count; i++) {
            arm(file);
            disarm(file);
        }
        answer(now_ns() - started);
    }
    return 0;
}

static int pinning(const char *device, const char *path)
{
    struct ibv_pd *domain = open_domain(device);
    int file = open_file(path);
    size_t len = (size_t)lseek(file, 0, SEEK_END), bytes;
    char *map = map_file(file, len);
    uint64_t count;
    printf("ready\n");
    fflush(stdout);
    while (scanf(" pin %zu %" SCNu64, &bytes, &count) == 2) {
        errno = EINVAL;
        demand(bytes <= len, "the file is shorter");
        uint64_t started = now_ns();
        for (uint64_t i = 0; i < count; i++) {
            demand(madvise(map, bytes, MADV_POPULATE_WRITE) == 0, "MADV_POPULATE_WRITE");
            demand(ibv_dereg_mr(register_on_demand(domain, map, bytes, 0)) == 0, "ibv_dereg_mr");
        }
        answer(now_ns() - started);
    }
    return 0;
}

static void hold(struct ibv_pd *domain, const char *path, size_t bytes, size_t count)
{
    int file = open_file(path);
    char *map = map_file(file, bytes);
    demand(madvise(map, bytes, MADV_POPULATE_WRITE) == 0, "MADV_POPULATE_WRITE");
    struct ibv_mr **regions = calloc(count + 1, sizeof *regions);
    demand(regions != NULL, "calloc");
    for (size_t i = 0; i < count; i++)
        regions[i] = register_on_demand(domain, map + i * PAGE % bytes, PAGE, 0);
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGRTMIN);
    demand(sigprocmask(SIG_BLOCK, &signals, NULL) == 0, "sigprocmask");
    arm(file);
    printf("held\n");
    fflush(stdout);
    demand(sigwaitinfo(&signals, NULL) == SIGRTMIN, "sigwaitinfo");
    demand(mprotect(map, bytes, PROT_NONE) == 0, "mprotect");
    disarm(file);
    for (size_t i = 0; i < count; i++)
        demand(ibv_dereg_mr(regions[i]) == 0, "ibv_dereg_mr");
    free(regions);
    munmap(map, bytes);
    close(file);
    printf("gone\n");
    fflush(stdout);
}

static int holding(const char *device, const char *path)
{
    struct ibv_pd *domain = open_domain(device);
    size_t bytes, count;
    printf("ready\n");
    fflush(stdout);
    while (scanf(" hold %zu %zu", &bytes, &count) == 2)
        hold(domain, path, bytes, count);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "arm") == 0)
        return arming(argv[2]);
    if (argc == 4 && strcmp(argv[1], "pin") == 0)
        return pinning(argv[2], argv[3]);
    if (argc == 4 && strcmp(argv[1], "hold") == 0)
        return holding(argv[2], argv[3]);
    fprintf(stderr, "usage: guards arm FILE | guards pin DEVICE FILE | guards hold DEVICE FILE\n");
    return 2;
}
