/* Stands where QEMU would, in the jail, and tells what it may do: one line "KIND NAME RESULT" for each try, -errno or 0.
 * DENIED and IOCTLS come from vmshell/launch/seccomp.py, by -include at build time. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

extern char **environ;

static void tell(const char *kind, const char *name, long result)
{
    printf("%s %s %ld\n", kind, name, result < 0 ? -(long)errno : 0);
    fflush(stdout);
}

static void list(const char *kind, const char *path)
{
    DIR *folder = opendir(path);
    struct dirent *entry;

    if (!folder) {
        tell(kind, path, -1);
        return;
    }
    while ((entry = readdir(folder)))
        if (entry->d_name[0] != '.')
            printf("%s %s 0\n", kind, entry->d_name);
    closedir(folder);
}

static void copy(const char *kind, const char *path)
{
    char line[512];
    FILE *file = fopen(path, "r");

    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        for (char *c = line; *c; c++)
            if (*c == ' ' || *c == '\t')
                *c = '_';
        printf("%s %s 0\n", kind, line);
    }
    if (file)
        fclose(file);
}

int main(int argc, char **argv)
{
    static const struct { const char *name; long number; } denied[] = { DENIED }, ioctls[] = { IOCTLS };
    char path[64], line[64];
    int null = open("/dev/null", O_RDWR), given = -1;

    setvbuf(stdout, NULL, _IOLBF, 0);
    for (char **word = environ; *word; word++)
        printf("environ %s 0\n", *word);
    list("root", "/");
    list("dev", "/dev");
    list("bin", "/usr/bin");
    list("proc", "/proc");
    list("fd", "/proc/self/fd");
    copy("mount", "/proc/self/mounts");
    copy("net", "/proc/net/dev");
    copy("limit", "/proc/self/limits");
    /* The line is QEMU's: what stands behind -kernel is the descriptor to be tried. */
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], "-kernel"))
            sscanf(argv[i + 1], "/proc/self/fd/%d", &given);
    snprintf(path, sizeof path, "/proc/self/fd/%d", given);
    tell("reopen", "read-write", open(path, O_RDWR));
    tell("reopen", "read-only", open(path, O_RDONLY));
    tell("read", "given", pread(given, line, 1, 0));
    tell("write", "/", open("/usr/x", O_CREAT | O_WRONLY, 0600));
    tell("exec", "/bin/sh", access("/bin/sh", X_OK));
    /* -1 for every argument: where nobody forbids the call, the kernel finds fault with them. */
    for (size_t i = 0; i < sizeof denied / sizeof *denied; i++)
        tell("call", denied[i].name, syscall(denied[i].number, -1, -1, -1, -1, -1, -1));
    for (size_t i = 0; i < sizeof ioctls / sizeof *ioctls; i++)
        tell("ioctl", ioctls[i].name, ioctl(null, ioctls[i].number, 0));
    tell("clone", "clone3", syscall(SYS_clone3, 0, 0));
    /* CLONE_NEWUSER with CLONE_FS: refused as nonsense where nobody forbids it, so no process ever comes of it. */
    tell("clone", "newuser", syscall(SYS_clone, 0x10000200, 0, 0, 0, 0));
    printf("end end 0\n");
    return 0;
}
