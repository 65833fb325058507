// Loads and unloads a library some times: for valgrind, which then sees what its static objects leave behind.
//
//   load_unload library.so [function]      the function takes nothing and returns an int; it is called once a
//   time

#include <dlfcn.h>
#include <stdio.h>

int main(int count, char** words) {
  for (int time = 0; time < 3; ++time) {
    void* const library = count > 1 ? dlopen(words[1], RTLD_NOW | RTLD_LOCAL) : NULL;
    if (library == NULL) {
      fprintf(stderr, "cannot be loaded: %s\n", dlerror());
      return 1;
    }
    if (count > 2) {
      int (*const function)(void) = (int (*)(void))dlsym(library, words[2]);
      if (function == NULL) return 2;
      printf("%d\n", function());
    }
    if (dlclose(library) != 0) return 3;
  }
  return 0;
}
