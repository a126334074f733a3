#ifndef DYLORA_TESTS_SUPPORT_PROCESS_HPP
#define DYLORA_TESTS_SUPPORT_PROCESS_HPP

#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/capability.h>
#include <sys/syscall.h>
#endif

#include <cerrno>
#include <csignal>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

namespace dylora::test {

/// A process that runs f(), which returns a std::string, and ends. It has a copy of everything that the test has; what it CHECKs goes
/// unheard.
class ChildProcess {
 public:
  template <class F>
  explicit ChildProcess(F&& f) {
    int ends[2];
    if (pipe(ends) != 0 || (pid_ = fork()) < 0) throw std::runtime_error("cannot start a process");
    if (pid_ == 0) {
      close(ends[0]);
      say(ends[1], result_of(f));
      _exit(0);  // the test's destructors are not its own to run
    }
    close(ends[1]);
    answer_ = ends[0];
  }
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;
  ~ChildProcess() {
    kill();
    wait();
  }

  /// As kill -9 does, at once. Nothing if wait() has returned.
  void kill() const {
    if (pid_ > 0) ::kill(pid_, SIGKILL);
  }

  /// Waits for the end. What f returned; what it threw after "threw: "; or "ended by signal 9".
  std::string wait() {
    if (pid_ <= 0) return "";
    std::string answer;
    char part[512];
    for (ssize_t got; (got = read(answer_, part, sizeof part)) != 0;) {
      if (got > 0) answer.append(part, static_cast<std::size_t>(got));
      if (got < 0 && errno != EINTR) break;
    }
    close(answer_);
    int status = 0;
    while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {}
    pid_ = -1;
    if (WIFSIGNALED(status)) return "ended by signal " + std::to_string(WTERMSIG(status));
    return WEXITSTATUS(status) == 0 ? answer : "ended with status " + std::to_string(WEXITSTATUS(status));
  }

 private:
  template <class F>
  static std::string result_of(F& f) {
    try {
      return f();
    } catch (const std::exception& error) {
      return std::string("threw: ") + error.what();
    }
  }

  static void say(int to, const std::string& text) {
    for (std::size_t said = 0; said < text.size();) {
      const ssize_t written = write(to, text.data() + said, text.size() - said);
      if (written < 0 && errno != EINTR) return;
      if (written > 0) said += static_cast<std::size_t>(written);
    }
  }

  pid_t pid_ = -1;
  int answer_ = -1;
};

/// Runs f() in a process of its own, to its end: CHECK(in_child([&] { return wrong_throw<FileError>(...); }) == "").
template <class F>
std::string in_child(F&& f) {
  return ChildProcess(std::forward<F>(f)).wait();
}

/// For a child: what root may do, it may no longer. On Linux it is the user that it was, without capabilities, so that it still reaches
/// what its owner may reach; elsewhere it is nobody.
inline void drop_privileges() {
  if (geteuid() != 0) return;
#ifdef __linux__
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  const __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3]{};
  const bool dropped = syscall(SYS_capset, &header, none) == 0;
#else
  constexpr unsigned nobody = 65534;
  const bool dropped = setgid(nobody) == 0 && setuid(nobody) == 0;
#endif
  if (!dropped) throw std::runtime_error("cannot drop the privileges of root");
}

}  // namespace dylora::test

#endif
