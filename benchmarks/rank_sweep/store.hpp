#ifndef DYLORA_BENCHMARKS_RANK_SWEEP_STORE_HPP
#define DYLORA_BENCHMARKS_RANK_SWEEP_STORE_HPP

#include <atomic>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "text/platform.hpp"

namespace rank_sweep {

/// Finished work, one line of JSON each under a key that says all it depends on: what is there need not be done again.
class Store {
 public:
  explicit Store(std::filesystem::path path) : path_(std::move(path)) {
    std::ifstream in(path_);
    for (std::string line; std::getline(in, line);) {
      const auto entry = nlohmann::json::parse(line, nullptr, false);
      if (entry.is_object() && entry.contains("key") && entry.contains("value")) known_[entry["key"]] = entry["value"];  // not a torn line
    }
    in.close();
    out_.open(path_, std::ios::app);
    if (!out_) throw std::runtime_error("cannot write " + path_.string());
    out_ << '\n';  // after a torn line, a new one
  }

  bool has(const std::string& key) const { return known_.contains(key); }
  const nlohmann::json& at(const std::string& key) const { return known_.at(key); }

  void add(const std::string& key, nlohmann::json value) {
    if (!(out_ << nlohmann::json{{"key", key}, {"value", value}}.dump() << '\n') || !out_.flush()) {
      throw std::runtime_error("cannot write " + path_.string());
    }
    known_[key] = std::move(value);
  }

 private:
  std::filesystem::path path_;
  std::map<std::string, nlohmann::json> known_;
  std::ofstream out_;
};

struct Job {
  std::string key, name;
  std::function<nlohmann::json()> work;
};

/// Does the jobs that the store does not have, `workers` at a time with one thread each, and says how far it is. The first error ends it,
/// once the jobs under way are done; what is done stays in the store.
inline void do_jobs(std::vector<Job> jobs, Store& store, int workers) {
  std::erase_if(jobs, [&](const Job& job) { return store.has(job.key); });
  std::atomic<std::size_t> next = 0;
  std::size_t done = 0;
  std::mutex mutex;
  std::exception_ptr error;
  const auto start = std::chrono::steady_clock::now();
  const auto work = [&] {
    text::use_threads(1);
    for (std::size_t i = next++; i < jobs.size(); i = next++) {
      try {
        auto value = jobs[i].work();
        const std::lock_guard lock(mutex);
        store.add(jobs[i].key, std::move(value));
        ++done;
        const double now = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        std::fprintf(stderr, "[%zu/%zu] %s, %.0f s left\n", done, jobs.size(), jobs[i].name.c_str(),
                     now / static_cast<double>(done) * static_cast<double>(jobs.size() - done));
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        next = jobs.size();
      }
    }
  };
  std::vector<std::thread> pool;
  for (int i = 0; i < workers; ++i) pool.emplace_back(work);
  for (std::thread& thread : pool) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace rank_sweep

#endif
