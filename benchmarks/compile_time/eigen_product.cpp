#include <Eigen/Core>

int main() {
  const Eigen::MatrixXf W = Eigen::MatrixXf::Random(64, 128), x = Eigen::MatrixXf::Random(128, 512);
  const Eigen::MatrixXf y = W * x;
  return y.allFinite() ? 0 : 1;
}
