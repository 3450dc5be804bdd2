package nb.calib.tagger

import org.pytorch.executorch.EValue
import org.pytorch.executorch.ExecuTorchRuntime
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** A program in ExecuTorch's Java API. It names no class of Android, so that it also runs in a JVM. */
class ModuleNet private constructor(private val module: Module, private val shape: LongArray) : Net {
    override val backends: List<String> = module.getMethodMetadata("forward").backends.toList()

    override fun run(input: FloatArray): FloatArray =
        module.forward(EValue.from(Tensor.fromBlob(input, shape)))[0].toTensor().dataAsFloatArray

    override fun close() = module.destroy()

    companion object {
        /** Identifiers of the backends that the library has. Throws [Refusal] where it does not load. */
        fun registered(): List<String> = native { ExecuTorchRuntime.getRegisteredBackends().toList() }

        /** Opens a file that [Program.read] accepted. Throws [Refusal] where a backend is missing or loading fails. */
        fun open(path: String, program: Program): ModuleNet = native {
            Backends.check(program.delegates, registered())
            val module = Module.load(path)
            val error = module.loadMethod("forward")
            if (error != 0) {
                module.destroy()
                throw Refusal(Fault.RUN_FAILED, "ExecuTorch error $error while loading")
            }
            ModuleNet(module, LongArray(program.input.size) { program.input[it].toLong() })
        }

        private fun <T> native(work: () -> T): T = try {
            work()
        } catch (e: LinkageError) {
            throw Refusal(Fault.NO_LIBRARY, e.message ?: e.javaClass.simpleName, e)
        } catch (e: OutOfMemoryError) {
            throw Refusal(Fault.OUT_OF_MEMORY, "", e)
        } catch (e: Refusal) {
            throw e
        } catch (e: RuntimeException) {
            throw Refusal(Fault.RUN_FAILED, e.message ?: e.javaClass.simpleName, e)
        }
    }
}
