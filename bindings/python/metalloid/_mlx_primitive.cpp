// Primitives of MLX that run Metalloid's operations and custom kernels. SPDX-License-Identifier: MIT
//
// MLX has no stable binary interface, so this file is part of the package as it is and is compiled where it is used, against the MLX
// that is installed (see mlx.py). It reaches Metalloid through the table of functions in metalloid._native, knows nothing of any one
// operation, and needs no header of Metalloid's but operations.h.
#include <Python.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <mlx/backend/cpu/encoder.h>
#include <mlx/mlx.h>
#include <mlx/primitives.h>

#include "operations.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace {

using Arrays = std::vector<mx::array>;

const mtl_operations *operations; // of the extension module, which stays loaded

// The operation in MLX's own terms, for its transformations: a Python function of the arrays. Let go of under the GIL.
class Formula {
  public:
    explicit Formula(nb::callable function) : function_(new nb::callable(std::move(function)), release) {}

    Arrays operator()(const Arrays &inputs) const {
        nb::gil_scoped_acquire gil;
        return nb::cast<Arrays>((*function_)(inputs));
    }

  private:
    static void release(nb::callable *function) {
        if (!Py_IsInitialized()) return; // the interpreter is gone, and the function with it
        nb::gil_scoped_acquire gil;
        delete function;
    }

    std::shared_ptr<nb::callable> function_;
};

struct Call {
    int operation;
    uint32_t given;
    std::vector<double> reals;
    std::vector<int64_t> integers;

    bool operator==(const Call &other) const {
        return operation == other.operation && given == other.given && reals == other.reals &&
               integers == other.integers;
    }
};

// An array as the table wants it: no copy, strides as they are.
struct View {
    mx::array array;
    std::vector<int64_t> shape, strides;

    explicit View(const mx::array &of)
        : array(mx::array::unsafe_weak_copy(of)), shape(of.shape().begin(), of.shape().end()),
          strides(of.strides().begin(), of.strides().end()) {}

    mtl_operand operand() {
        static constexpr uint8_t signed_code = 0, unsigned_code = 1, float_code = 2, bfloat_code = 4, complex_code = 5,
                                 bool_code = 6, other_code = 255;
        uint8_t code = other_code;
        switch (array.dtype()) {
        case mx::int8:
        case mx::int16:
        case mx::int32:
        case mx::int64: code = signed_code; break;
        case mx::uint8:
        case mx::uint16:
        case mx::uint32:
        case mx::uint64: code = unsigned_code; break;
        case mx::float16:
        case mx::float32:
        case mx::float64: code = float_code; break;
        case mx::bfloat16: code = bfloat_code; break;
        case mx::bool_: code = bool_code; break;
        case mx::complex64: code = complex_code; break;
        default: break;
        }
        mtl_operand result{};
        result.data = array.data<char>();
        result.shape = shape.data();
        result.strides = strides.data();
        result.rank = static_cast<int32_t>(shape.size());
        result.code = code;
        result.bits = static_cast<uint8_t>(8 * mx::size_of(array.dtype()));
        return result;
    }

    // NaN in a result that is not there, 0 where the dtype has none. To MLX it is evaluated, and who asks again, as NumPy does
    // after an exception of the buffer protocol, gets what is in its memory.
    void spoil() {
        constexpr float nan = std::numeric_limits<float>::quiet_NaN();
        constexpr uint16_t nan_of_float16 = 0x7e00, nan_of_bfloat16 = 0x7fc0;
        char *data = array.data<char>();
        size_t count = array.size();
        switch (array.dtype()) {
        case mx::float16: std::fill_n(reinterpret_cast<uint16_t *>(data), count, nan_of_float16); break;
        case mx::bfloat16: std::fill_n(reinterpret_cast<uint16_t *>(data), count, nan_of_bfloat16); break;
        case mx::float32: std::fill_n(reinterpret_cast<float *>(data), count, nan); break;
        case mx::complex64: std::fill_n(reinterpret_cast<float *>(data), 2 * count, nan); break;
        case mx::float64: std::fill_n(reinterpret_cast<double *>(data), count, nan); break;
        default: std::fill_n(data, array.nbytes(), '\0'); break;
        }
    }
};

// Does `run` when the stream comes to it; its status is an exception where the outputs are waited for.
template <class Run> void queue(mx::Stream stream, const Arrays &inputs, Arrays &outputs, Run run) {
    auto &encoder = mx::cpu::get_command_encoder(stream);
    std::vector<View> read(inputs.begin(), inputs.end()), written(outputs.begin(), outputs.end());
    for (const auto &input : inputs) encoder.set_input_array(input);
    for (auto &output : outputs) encoder.set_output_array(output);
    encoder.dispatch([run = std::move(run), read = std::move(read), written = std::move(written)]() mutable {
        std::vector<mtl_operand> operands;
        operands.reserve(read.size() + written.size());
        for (auto &view : read) operands.push_back(view.operand());
        for (auto &view : written) operands.push_back(view.operand());
        mtl_operands arguments{};
        arguments.inputs = operands.data();
        arguments.outputs = operands.data() + read.size();
        arguments.input_count = static_cast<int32_t>(read.size());
        arguments.output_count = static_cast<int32_t>(written.size());
        constexpr int invalid_argument = 1; // METALLOID_INVALID_ARGUMENT
        int status = run(arguments);
        if (status == 0) return;
        for (auto &view : written) view.spoil();
        if (status == invalid_argument) throw std::invalid_argument(operations->last_error());
        throw std::runtime_error(operations->last_error());
    });
}

class Operation : public mx::Primitive {
  public:
    Operation(mx::Stream stream, std::string name, Call call, Formula formula)
        : Primitive(stream), name_("Metalloid_" + std::move(name)), call_(std::move(call)),
          formula_(std::move(formula)) {}

    void eval_cpu(const Arrays &inputs, Arrays &outputs) override {
        for (auto &output : outputs) output.set_data(mx::allocator::malloc(output.nbytes()));
        queue(stream(), inputs, outputs, [call = call_](mtl_operands &arguments) {
            arguments.given = call.given;
            arguments.reals = call.reals.data();
            arguments.integers = call.integers.data();
            return operations->run(call.operation, &arguments);
        });
    }

    void eval_gpu(const Arrays &, Arrays &) override {
        throw std::runtime_error("Metalloid's primitive runs on the CPU");
    }

    // Transformations are those of the formula, of the arguments that they concern alone.
    std::vector<mx::array> vjp(const Arrays &primals, const Arrays &cotangents, const std::vector<int> &argnums,
                               const Arrays &) override {
        auto [results, gradients] = mx::vjp(with_others_fixed(primals, argnums), chosen(primals, argnums), cotangents);
        return gradients;
    }

    std::vector<mx::array> jvp(const Arrays &primals, const Arrays &tangents,
                               const std::vector<int> &argnums) override {
        auto [results, outgoing] = mx::jvp(with_others_fixed(primals, argnums), chosen(primals, argnums), tangents);
        return outgoing;
    }

    std::pair<std::vector<mx::array>, std::vector<int>> vmap(const Arrays &inputs,
                                                             const std::vector<int> &axes) override {
        auto formula = formula_;
        auto function = [formula](const Arrays &given) { return formula(given); };
        auto results = mx::vmap(function, axes)(inputs);
        return {results, std::vector<int>(results.size(), 0)};
    }

    const char *name() const override { return name_.c_str(); }

    bool is_equivalent(const Primitive &other) const override {
        auto *same = dynamic_cast<const Operation *>(&other);
        return same && call_ == same->call_;
    }

    std::vector<mx::Shape> output_shapes(const Arrays &inputs) override {
        std::vector<mx::Shape> shapes;
        for (const auto &result : formula_(inputs)) shapes.push_back(result.shape());
        return shapes;
    }

  private:
    static Arrays chosen(const Arrays &primals, const std::vector<int> &argnums) {
        Arrays some;
        for (int argument : argnums) some.push_back(primals[argument]);
        return some;
    }

    std::function<Arrays(const Arrays &)> with_others_fixed(const Arrays &primals, const std::vector<int> &argnums) {
        auto formula = formula_;
        return [formula, primals, argnums](const Arrays &some) {
            auto all = primals;
            for (size_t i = 0; i < argnums.size(); i++) all[argnums[i]] = some[i];
            return formula(all);
        };
    }

    std::string name_;
    Call call_;
    Formula formula_;
};

// A call's capsule. Where a stream's thread is the last to hold it, Python's lets go of it later: whoever waits for the stream may
// have the GIL. Python's own queue of such calls holds 32, so that here is one that empties a list.
class Held {
  public:
    static std::shared_ptr<Held> make(nb::capsule call) {
        empty();
        return std::shared_ptr<Held>(new Held(std::move(call)), release);
    }

    const void *call() const { return call_.data(MTL_KERNEL_CALL_CAPSULE); }

  private:
    explicit Held(nb::capsule call) : call_(std::move(call)) {}

    static void release(Held *held) {
        if (!Py_IsInitialized()) return; // the interpreter is gone, and the capsule with it
        if (PyGILState_Check()) {
            delete held;
            return;
        }
        held->next_ = dropped.load();
        while (!dropped.compare_exchange_weak(held->next_, held)) continue;
        // Where Python's queue is full, the next release or the next launch sees to it.
        if (!pending.exchange(true) && Py_AddPendingCall(empty_pending, nullptr) != 0) pending = false;
    }

    static int empty_pending(void *) {
        pending = false;
        empty();
        return 0;
    }

    static void empty() {
        for (Held *held = dropped.exchange(nullptr); held;) {
            Held *next = held->next_;
            delete held;
            held = next;
        }
    }

    static inline std::atomic<Held *> dropped{nullptr};
    static inline std::atomic<bool> pending{false};

    nb::capsule call_;
    Held *next_ = nullptr;
};

// Stands where a custom kernel has no result to give, and raises when it is evaluated. MLX transforms what is within a
// mx.custom_function too, and drops that for what the function's own rule gives.
class Refusal : public mx::Primitive {
  public:
    Refusal(mx::Stream stream, std::string what) : Primitive(stream), what_(std::move(what)) {}

    void eval_cpu(const Arrays &, Arrays &) override {
        throw std::invalid_argument("a custom kernel has no " + what_ +
                                    ": give it one with mx.custom_function and its " + what_);
    }

    void eval_gpu(const Arrays &inputs, Arrays &outputs) override { eval_cpu(inputs, outputs); }

    const char *name() const override { return "CustomKernelRefusal"; }

  private:
    std::string what_;
};

// A custom kernel's call. As MLX's own kernels it is traced and compiled, and has no gradient.
class Kernel : public mx::Primitive {
  public:
    Kernel(mx::Stream stream, nb::capsule call, std::vector<mx::Shape> shapes, std::vector<mx::Dtype> dtypes)
        : Primitive(stream), held_(Held::make(std::move(call))), shapes_(std::move(shapes)),
          dtypes_(std::move(dtypes)) {}

    void eval_cpu(const Arrays &inputs, Arrays &outputs) override {
        for (auto &output : outputs) allocate(output);
        queue(stream(), inputs, outputs, [call = held_->call(), held = held_](mtl_operands &arguments) {
            return operations->launch(call, &arguments);
        });
    }

    void eval_gpu(const Arrays &, Arrays &) override {
        throw std::runtime_error("Metalloid's kernels on MLX arrays run on the CPU");
    }

    std::vector<mx::array> vjp(const Arrays &, const Arrays &, const std::vector<int> &, const Arrays &) override {
        throw std::invalid_argument("a custom kernel has no gradient: give it one with mx.custom_function and its vjp");
    }

    std::vector<mx::array> jvp(const Arrays &primals, const Arrays &, const std::vector<int> &) override {
        return refusals("jvp", shapes_, primals);
    }

    std::pair<std::vector<mx::array>, std::vector<int>> vmap(const Arrays &inputs,
                                                             const std::vector<int> &axes) override {
        size_t mapped = std::find_if(axes.begin(), axes.end(), [](int axis) { return axis >= 0; }) - axes.begin();
        auto shapes = shapes_;
        for (auto &shape : shapes) shape.insert(shape.begin(), inputs.at(mapped).shape(axes[mapped]));
        return {refusals("vmap", std::move(shapes), inputs), std::vector<int>(shapes_.size(), 0)};
    }

    const char *name() const override { return "CustomKernel"; }

  private:
    Arrays refusals(const char *what, std::vector<mx::Shape> shapes, const Arrays &inputs) {
        return mx::array::make_arrays(std::move(shapes), dtypes_, std::make_shared<Refusal>(stream(), what), inputs);
    }

    // Begins at a multiple of 32 bytes, as vectors in it must: MLX's memory begins 8 bytes behind one of 16.
    static void allocate(mx::array &output) {
        constexpr size_t alignment = 32;
        size_t item = mx::size_of(output.dtype());
        mx::array room(mx::Shape{static_cast<int>(alignment / item)}, output.dtype(), nullptr, {});
        room.set_data(mx::allocator::malloc(output.nbytes() + alignment));
        size_t beyond = reinterpret_cast<uintptr_t>(room.data<char>()) % alignment;
        size_t offset = beyond ? alignment - beyond : 0;
        auto flags = room.flags();
        flags.col_contiguous = output.size() <= 1;
        for (auto extent : output.shape()) flags.col_contiguous |= static_cast<size_t>(extent) == output.size();
        output.copy_shared_buffer(room, output.strides(), flags, output.size(),
                                  offset % item ? 0 : static_cast<int64_t>(offset / item));
    }

    std::shared_ptr<Held> held_;
    std::vector<mx::Shape> shapes_;
    std::vector<mx::Dtype> dtypes_;
};

} // namespace

NB_MODULE(METALLOID_MODULE, module) {
    nb::module_::import_("mlx.core"); // whose types are used here
    nb::object capsule = nb::module_::import_("metalloid._native").attr("operations");
    operations = static_cast<const mtl_operations *>(PyCapsule_GetPointer(capsule.ptr(), MTL_OPERATIONS_CAPSULE));
    if (!operations) throw nb::python_error();
    if (operations->size < sizeof(mtl_operations))
        throw std::runtime_error("metalloid._native is older than this file");

    module.def(
        "apply",
        [](const std::string &name, uint32_t given, std::vector<double> reals, std::vector<int64_t> integers,
           const Arrays &inputs, const std::vector<std::vector<int>> &shapes, const std::vector<mx::Dtype> &dtypes,
           nb::callable formula, mx::StreamOrDevice stream) {
            int operation = operations->find(name.c_str());
            if (operation < 0) throw std::invalid_argument("there is no operation " + name);
            Call call{operation, given, std::move(reals), std::move(integers)};
            auto primitive =
                std::make_shared<Operation>(mx::to_stream(stream), name, std::move(call), Formula(std::move(formula)));
            std::vector<mx::Shape> extents;
            for (const auto &shape : shapes) extents.emplace_back(shape.begin(), shape.end());
            return mx::array::make_arrays(std::move(extents), dtypes, primitive, inputs);
        },
        nb::arg("name"), nb::arg("given"), nb::arg("reals"), nb::arg("integers"), nb::arg("inputs"), nb::arg("shapes"),
        nb::arg("dtypes"), nb::arg("formula"), nb::arg("stream").none() = nb::none());

    module.def(
        "launch",
        [](nb::capsule call, const Arrays &inputs, const std::vector<std::vector<int>> &shapes,
           const std::vector<mx::Dtype> &dtypes, mx::StreamOrDevice stream) {
            std::vector<mx::Shape> extents;
            for (const auto &shape : shapes) extents.emplace_back(shape.begin(), shape.end());
            auto primitive = std::make_shared<Kernel>(mx::to_stream(stream), std::move(call), extents, dtypes);
            return mx::array::make_arrays(std::move(extents), dtypes, primitive, inputs);
        },
        nb::arg("call"), nb::arg("inputs"), nb::arg("shapes"), nb::arg("dtypes"),
        nb::arg("stream").none() = nb::none());
}
