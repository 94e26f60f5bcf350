"""A layer's type, from everything that inspectors of TensorRT 10 and 11 are known to say."""

import pytest

from pmm_edge.export.tensorrt import count_layers, layer_type

DYNAMIC = {"Name": "x", "Format/Datatype": "N/A due to dynamic shapes"}


def ten(*formats: str) -> list[dict[str, str]]:
    return [{"Name": "x", "Format/Datatype": text} for text in formats]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ({"Inputs": ten("Half"), "Outputs": ten("Float")}, "FP16"),
        ({"Inputs": ten("Row major linear FP32"), "Outputs": ten("Half")}, "FP32"),
        ({"Inputs": ten("Channel major FP16 format where channel % 8 == 0.")}, "FP16"),
        ({"Inputs": ten("Thirty-two wide channel vectorized row major Int8 format.", "Half")}, "INT8"),
        ({"Inputs": ten("Row major linear BFloat16 format")}, "BF16"),
        ({"Inputs": [{"Format": "Row major linear FP16 format (kLINEAR)", "DataType": "Half"}]}, "FP16"),
        ({"Inputs": [{"Format": "kLINEAR", "Datatype": "FP8"}]}, "FP8"),
        ({"Inputs": ten("UInt8"), "Outputs": ten("Half")}, "FP16"),
        ({"Inputs": ten("Int32", "Bool")}, "unknown"),
        ({"Inputs": [DYNAMIC], "Weights": {"Type": "Int8", "Count": 9}}, "INT8"),
        ({"Inputs": [DYNAMIC], "Outputs": [DYNAMIC], "Weights": {"Type": "Half", "Count": 9}}, "FP16"),
        ({"Inputs": [DYNAMIC], "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_n"}, "INT8"),
        ({"Inputs": [DYNAMIC], "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc"}, "FP16"),
        ({"Inputs": [DYNAMIC], "TacticName": "sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32"}, "FP32"),
        ({"Inputs": [DYNAMIC], "TacticName": "ampere_h16816gemm_128x64_ldg8_stages_64x3_tn"}, "FP16"),
        ({"Inputs": [DYNAMIC], "TacticName": "cudnn_something"}, "unknown"),
        ({"Name": "alone"}, "unknown"),
    ],
)
def test_types(layer: dict, expected: str) -> None:
    assert layer_type(layer) == expected


def test_copies_do_not_count_and_products_count_twice() -> None:
    count = count_layers(
        [
            {"LayerType": "Reformat", "Inputs": ten("Half")},
            {"LayerType": "NoOp", "Inputs": ten("Half")},
            {"LayerType": "CaskConvolution", "Inputs": [DYNAMIC], "Weights": {"Type": "Half"}},
            {"LayerType": "gemm", "Inputs": ten("Half")},
            {"LayerType": "kgen", "Name": "__myl_ConvAddRelu_myl0_3", "Inputs": ten("Half")},
            {"LayerType": "kgen", "Name": "__myl_Convert_myl0_1", "Inputs": ten("Float"), "Outputs": ten("Half")},
            {"LayerType": "kgen", "Name": "conv1_DequantizeLinear", "Inputs": ten("Int8"), "Outputs": ten("Float")},
            "a name alone",
        ]
    )
    assert count.layers == {"FP16": 3, "FP32": 1, "INT8": 1, "unknown": 1}
    assert count.products == {"FP16": 3}
