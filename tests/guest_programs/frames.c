/* frames send IF HEX...: put each frame on the wire as it stands; says "sent N".
 * frames watch IF SECONDS: every frame that arrives and that we did not send, in hex, its first 96 bytes; then "watched N". */
#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>

int main(int argc, char **argv)
{
    if (argc < 4)
        return 2;
    int fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL)), count = 0;
    struct sockaddr_ll at = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL), .sll_ifindex = if_nametoindex(argv[2])};
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof at) < 0) {
        perror("frames");
        return 1;
    }
    unsigned char frame[2048];
    if (!strcmp(argv[1], "send")) {
        for (int i = 3; i < argc; i++) {
            size_t n = strlen(argv[i]) / 2;
            for (size_t j = 0; j < n; j++)
                sscanf(argv[i] + 2 * j, "%2hhx", &frame[j]);
            count += send(fd, frame, n, 0) == (ssize_t)n;
        }
        printf("sent %d\n", count);
        return 0;
    }
    struct packet_mreq all = {.mr_ifindex = at.sll_ifindex, .mr_type = PACKET_MR_PROMISC};
    setsockopt(fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &all, sizeof all);
    puts("watching");
    fflush(stdout);
    for (time_t end = time(0) + atoi(argv[3]); time(0) < end;) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        if (poll(&ready, 1, 200) < 1)
            continue;
        struct sockaddr_ll from;
        socklen_t size = sizeof from;
        ssize_t n = recvfrom(fd, frame, sizeof frame, 0, (struct sockaddr *)&from, &size);
        if (n < 0 || from.sll_pkttype == PACKET_OUTGOING)
            continue;
        for (ssize_t j = 0; j < n && j < 96; j++)
            printf("%02x", frame[j]);
        putchar('\n');
        count++;
    }
    printf("watched %d\n", count);
    return 0;
}
