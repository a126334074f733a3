#ifndef DYLORA_BENCHMARKS_PEERS_TORCH_PEER_HPP
#define DYLORA_BENCHMARKS_PEERS_TORCH_PEER_HPP

#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <thread>

namespace peers {

/// PyTorch in a process of its own, to take turns with: torch_peer.py beside this file, which says what may be asked of it.
///
///     if (const auto torch = TorchPeer::start()) {
///       const auto layer = torch->ask({{"do", "linear"}, {"in", 64}, …});
///       contenders.push_back({layer.at("how"), [=] { return torch->seconds({{"do", "repeat"}, {"id", layer.at("id")}, {"seconds", 0.02}}); }});
///     }
///
/// Between the requests the process is stopped, so that its waiting threads hold no core while others take their turn. Those of this
/// process are given time to fall asleep, which they never do under OMP_WAIT_POLICY=active.
class TorchPeer {
 public:
  /// Null where there is no Python that has PyTorch.
  static std::shared_ptr<TorchPeer> start() {
    for (const char* python : {"python3", "/usr/bin/python3"}) {
      std::shared_ptr<TorchPeer> peer(new TorchPeer(python));
      if (peer->receive_line()) {
        peer->version_ = nlohmann::json::parse(peer->line_).at("version");
        kill(peer->process_, SIGSTOP);
        return peer;
      }
    }
    return nullptr;
  }

  ~TorchPeer() {
    close(socket_);
    kill(process_, SIGKILL);
    waitpid(process_, nullptr, 0);
  }
  TorchPeer(const TorchPeer&) = delete;
  TorchPeer& operator=(const TorchPeer&) = delete;

  const std::string& version() const { return version_; }

  /// Throws std::runtime_error if the process ends instead of replying.
  nlohmann::json ask(const nlohmann::json& request) {
    const std::string line = request.dump() + '\n';
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // until the waiting threads of this process sleep
    kill(process_, SIGCONT);
    if (send(socket_, line.data(), line.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(line.size()) || !receive_line()) {
      throw std::runtime_error("torch_peer.py ended at the request " + line);
    }
    kill(process_, SIGSTOP);
    return nlohmann::json::parse(line_);
  }

  double seconds(const nlohmann::json& request) { return ask(request).at("seconds"); }

 private:
  explicit TorchPeer(const char* python) {
    const std::string script = std::filesystem::absolute(__FILE__).replace_filename("torch_peer.py").string();
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) throw std::runtime_error("no socket for torch_peer.py");
    process_ = fork();
    if (process_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);  // stopped, it would outlive a program that is interrupted
      dup2(ends[1], STDIN_FILENO);
      dup2(ends[1], STDOUT_FILENO);
      execlp(python, python, "-B", script.c_str(), nullptr);
      _exit(127);
    }
    close(ends[1]);
    socket_ = ends[0];
    if (process_ < 0) throw std::runtime_error("no process for torch_peer.py");
  }

  /// False at the end of what the process has to say.
  bool receive_line() {
    line_.clear();
    for (char byte = 0; read(socket_, &byte, 1) == 1;) {
      if (byte == '\n') return true;
      line_.push_back(byte);
    }
    return false;
  }

  pid_t process_ = -1;
  int socket_ = -1;
  std::string version_, line_;
};

}  // namespace peers

#endif
