// A byte of glibc 2.32 that newer C++ headers read for a shortcut where there is one thread. With
// one of its own the library loads with older ones too; 0 means that there may be more.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
