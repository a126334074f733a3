#ifndef DYLORA_BENCHMARKS_RANK_SWEEP_REPORT_HPP
#define DYLORA_BENCHMARKS_RANK_SWEEP_REPORT_HPP

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <dylora/dylora.hpp>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "rank_sweep/contender.hpp"

namespace rank_sweep {

/// The losses of a contender at each rank: the mean over seeds, the lowest and the highest.
struct Series {
  std::string name;
  double lr = 0;
  bool edge = false;  ///< the rate is the smallest or the largest of the grid: there may be a better one beyond
  Index steps = 0;
  double seconds = 0, flops = 0;  ///< of one run, the mean over seeds
  std::vector<double> mean, low, high;
};

/// The share of what a dedicated LoRA of each rank gains over the base; 1 is all of it.
inline std::vector<double> gain_share(double base, const Series& series, const Series& dedicated) {
  std::vector<double> shares;
  for (std::size_t i = 0; i < series.mean.size(); ++i) {
    shares.push_back((base - series.mean[i]) / (base - dedicated.mean[i]));
  }
  return shares;
}

inline void print_row(const std::string& name, const std::vector<double>& values, const char* format, const std::string& end = "") {
  // Letters of more than one byte take one column.
  const auto columns = std::count_if(name.begin(), name.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; });
  std::printf("%s%*s", name.c_str(), static_cast<int>(std::max<std::ptrdiff_t>(0, 30 - columns)), "");
  for (const double value : values) std::printf(format, value);
  std::printf("%s\n", end.c_str());
}

inline void write_csv(const std::filesystem::path& path, double base, const std::vector<Series>& all) {
  std::ofstream out(path);
  out << "contender,rank,mean,low,high\n";
  out << "base,0," << base << ',' << base << ',' << base << '\n';
  for (const Series& series : all) {
    for (std::size_t i = 0; i < series.mean.size(); ++i) {
      out << '"' << series.name << "\"," << i + 1 << ',' << series.mean[i] << ',' << series.low[i] << ',' << series.high[i] << '\n';
    }
  }
  if (!out.flush()) throw std::runtime_error("cannot write " + path.string());
}

/// Loss against rank for all contenders, as rank_sweep.svg beside the CSV. Says so if there is no gnuplot.
inline void draw(const std::filesystem::path& folder, double base, const std::vector<Series>& all) {
  const std::filesystem::path script = folder / "rank_sweep.gnuplot";
  std::ofstream out(script);
  out << "set encoding utf8\nset terminal svg size 960,600 font 'sans,13'\nset output '" << (folder / "rank_sweep.svg").string() << "'\n"
      << "set xlabel 'rank'\nset ylabel 'loss on held-out text (nats per byte)'\nset key outside right\nset grid\nset xrange [0.8:"
      << static_cast<double>(all.front().mean.size()) + 0.2 << "]\nset yrange [*:" << base * 1.1 << "]\n";
  for (std::size_t i = 0; i < all.size(); ++i) {
    out << "$data" << i << " << END\n";
    for (std::size_t r = 0; r < all[i].mean.size(); ++r) {
      out << r + 1 << ' ' << all[i].mean[r] << ' ' << all[i].low[r] << ' ' << all[i].high[r] << '\n';
    }
    out << "END\n";
  }
  out << "plot " << base << " title 'no adapter' dashtype 2 linecolor 'gray'";
  for (std::size_t i = 0; i < all.size(); ++i) {
    out << ", $data" << i << " using 1:2:3:4 with yerrorlines title '" << all[i].name << "' pointtype " << i + 1;
  }
  out << '\n';
  out.close();
  if (!out) throw std::runtime_error("cannot write " + script.string());
  const std::string command = "gnuplot '" + script.string() + "'";
  if (std::system("gnuplot --version > /dev/null 2>&1") != 0) {
    std::printf("no gnuplot here, so no picture; the numbers are in rank_sweep.csv\n");
  } else if (std::system(command.c_str()) != 0) {
    std::printf("gnuplot failed on %s; the numbers are in rank_sweep.csv\n", script.string().c_str());
  } else {
    std::printf("picture: %s\n", (folder / "rank_sweep.svg").string().c_str());
  }
}

}  // namespace rank_sweep

#endif
