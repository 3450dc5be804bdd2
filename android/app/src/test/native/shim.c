/* What Android's C library has and glibc lacks, so that the x86_64 libraries of the app load into a JVM on a PC.
   Built as libc.so, libm.so, libdl.so, liblog.so and libandroid.so by tests/test_android.py; for tests alone. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

char __sF[3 * 152]; /* bionic's stdin, stdout, stderr: addressed, and written to only on the way to abort() */

int __android_log_vprint(int level, const char *tag, const char *format, va_list list) {
    fprintf(stderr, "%d %s: ", level, tag);
    int n = vfprintf(stderr, format, list);
    fputc('\n', stderr);
    return n;
}
int __android_log_print(int level, const char *tag, const char *format, ...) {
    va_list list;
    va_start(list, format);
    int n = __android_log_vprint(level, tag, format, list);
    va_end(list);
    return n;
}
int __android_log_write(int level, const char *tag, const char *text) { return fprintf(stderr, "%d %s: %s\n", level, tag, text); }
void __android_log_assert(const char *condition, const char *tag, const char *format, ...) {
    fprintf(stderr, "%s: %s\n", tag ? tag : "", condition ? condition : format);
    abort();
}
void android_set_abort_message(const char *text) { fprintf(stderr, "%s\n", text); }
int ffl0sh(FILE *file) { /* the libraries' fflush: one of the three streams above is none of glibc's */
    char *at = (char *)file;
    return at >= __sF && at < __sF + sizeof __sF ? 0 : fflush(file);
}
long sysc0nf(int name) { /* the libraries' sysconf: Android numbers the questions in another way */
    switch (name) {
    case 39: case 40: return sysconf(_SC_PAGESIZE);
    case 96: return sysconf(_SC_NPROCESSORS_CONF);
    case 97: return sysconf(_SC_NPROCESSORS_ONLN);
    case 98: return sysconf(_SC_PHYS_PAGES);
    default: return -1;
    }
}
int *__errno(void) { return &errno; }
char *__gnu_strerror_r(int error, char *buffer, size_t length) { return strerror_r(error, buffer, length); }
int __system_property_get(const char *name, char *value) { *value = 0; return 0; }
size_t __strlen_chk(const char *s, size_t n) { return strlen(s); }
char *__strchr_chk(const char *s, int c, size_t n) { return strchr(s, c); }
char *__strrchr_chk(const char *s, int c, size_t n) { return strrchr(s, c); }
ssize_t __write_chk(int file, const void *data, size_t count, size_t size) { return write(file, data, count); }
