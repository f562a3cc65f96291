"""Programs that completions hold, run in a sandbox.

code            the reward function
harness         runs a program's tests in another process
sandbox         asks the sandbox's server to run a command
sandbox_init    that server: a fresh cell for each command
sandbox_root    the namespaces and the root directory of that server
sandbox_kernel  what is asked of Linux: namespaces, mounts, system calls
"""
