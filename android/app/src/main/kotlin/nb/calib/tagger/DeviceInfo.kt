package nb.calib.tagger

/** What the phone says of itself; "" where it says nothing. [soc] needs Android 12. */
class DeviceInfo(
    val maker: String, val model: String, val android: String, val soc: String, val hardware: String, val abi: String,
    val cores: Int, val memoryMb: Int,
) {
    /** The chip's common name where it is known, else what the phone says. */
    val chip: String
        get() = CHIPS[hardware.lowercase()] ?: CHIPS[soc.lowercase()] ?: soc.ifEmpty { hardware }.ifEmpty { "?" }

    fun toMap(): Map<String, Any?> = linkedMapOf(
        "maker" to maker, "model" to model, "android" to android, "soc" to soc, "hardware" to hardware,
        "chip" to chip, "abi" to abi, "cores" to cores, "memory_mb" to memoryMb,
    )

    private companion object {
        val CHIPS = mapOf(
            "s5e9945" to "Exynos 2400", "s5e9935" to "Exynos 2300", "s5e9925" to "Exynos 2200",
            "s5e9955" to "Exynos 2500", "s5e8845" to "Exynos 1480",
            "sm8650" to "Snapdragon 8 Gen 3", "sm8550" to "Snapdragon 8 Gen 2", "sm8450" to "Snapdragon 8 Gen 1",
            "sm8750" to "Snapdragon 8 Elite", "mt6989" to "Dimensity 9300", "zuma" to "Google Tensor G3",
            "zumapro" to "Google Tensor G4",
        )
    }
}

/** Where a backend runs. */
enum class Processor { CPU, GPU, NPU }

/** Whether a backend can be chosen, and if not, why. */
enum class State { READY, NOT_IN_PROGRAM, NOT_IN_BUILD }

/** One backend of the choice. It is offered only where the program has it and the library has it, too. */
class BackendOption(val id: String, val title: String, val processor: Processor, val state: State)

object Backends {
    /** Identifier, title, processor. "" is the plain operators of the library. */
    private val KNOWN = listOf(
        Triple("XnnpackBackend", "XNNPACK", Processor.CPU), Triple("", "portable", Processor.CPU),
        Triple("VulkanBackend", "Vulkan", Processor.GPU), Triple("EnnBackend", "Samsung Exynos", Processor.NPU),
        Triple("QnnBackend", "Qualcomm QNN", Processor.NPU), Triple("NeuropilotBackend", "MediaTek NeuroPilot", Processor.NPU),
    )

    /** The choice for a program with these delegates in a library with these backends. */
    fun options(delegates: List<String>, registered: List<String>): List<BackendOption> {
        val used = delegates.ifEmpty { listOf("") }
        val others = (used - KNOWN.map { it.first }.toSet()).map { Triple(it, it, Processor.NPU) }
        return (KNOWN + others).map { (id, title, processor) ->
            val state = when {
                id != "" && id !in registered -> State.NOT_IN_BUILD
                id !in used -> State.NOT_IN_PROGRAM
                else -> State.READY
            }
            BackendOption(id, title, processor, state)
        }
    }

    /** Throws [Refusal] unless every delegate of the program is in the library. */
    fun check(delegates: List<String>, registered: List<String>) {
        val missing = delegates - registered.toSet()
        if (missing.isNotEmpty()) throw Refusal(Fault.NO_BACKEND, missing.joinToString())
    }
}
