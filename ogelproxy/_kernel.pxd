# The kernel's calls on descriptors: epoll(7), timerfd_create(2), recv(2), send(2).

from libc.stdint cimport uint32_t, uint64_t
from posix.time cimport timespec


cdef extern from "sys/epoll.h" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int epoll_wait(int epfd, epoll_event* events, int count, int timeout)
    enum:
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_MOD
        EPOLL_CTL_DEL
        EPOLLIN
        EPOLLOUT
        EPOLLRDHUP
        EPOLLHUP
        EPOLLERR
        EPOLLET

cdef extern from "sys/timerfd.h" nogil:
    cdef struct itimerspec:
        timespec it_interval
        timespec it_value
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, itimerspec* new, itimerspec* old)
    enum:
        TFD_CLOEXEC
        TFD_NONBLOCK

cdef extern from *:
    # The C library's recv and send may be cancelled by another thread, and pay for
    # that with atomic operations where there is one: the system calls alone do not.
    """
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #ifdef SYS_recvfrom
    #define receive_from(fd, into, size, flags) \
        syscall(SYS_recvfrom, fd, into, size, flags, NULL, NULL)
    #define send_to(fd, data, size, flags) \
        syscall(SYS_sendto, fd, data, size, flags, NULL, 0)
    #else
    #define receive_from recv
    #define send_to send
    #endif
    """
    ssize_t recv "receive_from"(int fd, void* into, size_t size, int flags) nogil
    ssize_t send "send_to"(int fd, const void* data, size_t size, int flags) nogil

cdef extern from "sys/socket.h" nogil:
    int shutdown(int fd, int how)
    enum:
        MSG_NOSIGNAL
        MSG_PEEK
        SHUT_WR
